"""Causal attention over packed sequences that share prefixes.

    T  packed queries    S  packed keys    H  query heads    G  key heads (H a multiple)    D  width

There is no padding and no mask in memory: `Spans` says for every run of queries at which position
it stands and in which rows of k and v its own past lies, in pieces. A query at position p sees the
keys at positions <= p, and of those the last `window` if there is one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sarm.ops import cpu
from sarm.ops.reference import accumulate_dtype


class Varlen(NamedTuple):
    """Spans as flash_attn takes them: rows of q and k to gather, cumulative counts, longest."""

    q_rows: Tensor
    k_rows: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True, eq=False)
class Spans:
    """Runs of queries and the ranges of keys that make up their sequences; int64 on the CPU.

    queries: (n, 5) first row in q, count, position of the first, first range, number of ranges.
    ranges: (m, 2) first row in k and v, count. A run's ranges, joined, are the keys at positions
    0, 1, ... of its sequence, at least to its last query.
    """

    queries: Tensor
    ranges: Tensor
    _copies: dict[torch.device, Varlen] = field(default_factory=dict, repr=False)
    _masks: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, runs: Sequence[tuple[int, int, int, Sequence[tuple[int, int]]]]) -> Spans:
        """From (first row in q, count, position, ranges) for each run."""
        queries: list[tuple[int, ...]] = []
        ranges: list[tuple[int, int]] = []
        for first, count, position, own in runs:
            queries.append((first, count, position, len(ranges), len(own)))
            ranges += own
        return cls(
            torch.tensor(queries, dtype=torch.int64).view(-1, 5),
            torch.tensor(ranges, dtype=torch.int64).view(-1, 2),
        )

    def mask(
        self,
        position: int,
        count: int,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """What is added to a run's scores: (count, position + count), 0 or -inf.

        Made once for all layers; scaled_dot_product_attention would turn a boolean one into this
        in each of them.
        """
        key = (position, count, window, dtype, device)
        if key not in self._masks:
            at = torch.arange(position, position + count, device=device)[:, None]
            to = torch.arange(position + count, device=device)
            hidden = to > at if window is None else (to > at) | (to <= at - window)
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=device)
            self._masks[key] = zeros.masked_fill_(hidden, -torch.inf)
        return self._masks[key]

    @functools.cached_property
    def varlen(self) -> Varlen:
        """For flash_attn, on the CPU; keys are cut at the run's last query."""
        runs, ranges = self.queries.tolist(), self.ranges.tolist()
        counts = [count for _, count, *_ in runs]
        lengths = [position + count for _, count, position, *_ in runs]
        keys = [
            torch.cat([torch.arange(r, r + n) for r, n in ranges[begin : begin + many]])[:length]
            for (*_, begin, many), length in zip(runs, lengths, strict=True)
        ]
        return Varlen(
            q_rows=torch.cat([torch.arange(first, first + count) for first, count, *_ in runs]),
            k_rows=torch.cat(keys),
            cu_q=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
            cu_k=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
            max_q=max(counts),
            max_k=max(lengths),
        )

    def varlen_on(self, device: torch.device) -> Varlen:
        """`varlen` on a device, copied once for all layers."""
        if device not in self._copies:
            at = self.varlen
            self._copies[device] = at._replace(
                q_rows=at.q_rows.to(device),
                k_rows=at.k_rows.to(device),
                cu_q=at.cu_q.to(device),
                cu_k=at.cu_k.to(device),
            )
        return self._copies[device]


def joined(ranges: Sequence[tuple[int, int]], first: int, count: int) -> list[tuple[int, int]]:
    """The ranges and one more; if that begins where the last one ends, they become one."""
    if ranges and sum(ranges[-1]) == first:
        return [*ranges[:-1], (ranges[-1][0], ranges[-1][1] + count)]
    return [*ranges, (first, count)]


def windows(config) -> list[int | None]:
    """The sliding window of every layer, None where it sees everything."""
    width = getattr(config, "sliding_window", None) if config.model_type != "llama" else None
    kinds = getattr(config, "layer_types", None)
    if not width or not kinds:  # Mistral has one window for all layers
        return [width or None] * config.num_hidden_layers
    return [width if kind == "sliding_attention" else None for kind in kinds]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v for every query over its own sequence.

    Args:
        q: (T, H, D); every row belongs to one run.   k, v: (S, G, D), q.dtype.
        window: keys a query sees, its own included; None: all.
        softcap: scores s become softcap * tanh(s / softcap).
    Returns:
        (T, H, D), q.dtype.

    On the CPU (C++ kernel, fp32 and bf16, fp32 arithmetic) a query's bits depend on its own
    sequence alone: not on what else is packed, how prefixes are shared, or the number of threads.
    Differentiable once; with fp32 this is the same kernel, in bf16 scaled_dot_product_attention
    takes its place where a gradient is asked for.
    """
    if torch.is_autocast_enabled(q.device.type):  # positions have widened q and k, not v
        k, v = k.to(q.dtype), v.to(q.dtype)
    inference = not torch.is_grad_enabled() or not any(t.requires_grad for t in (q, k, v))
    dtypes = (torch.float32, torch.bfloat16) if inference else (torch.float32,)
    if q.device.type == "cpu" and q.dtype in dtypes and has_kernels():
        if inference:
            return _by_kernel(q, k, v, spans, scale, window, softcap)
        return _Attention.apply(q, k, v, spans, scale, window, softcap)
    if q.device.type == "cuda" and _flash_attn() and q.dtype in (torch.float16, torch.bfloat16):
        return _flash(q, k, v, spans, scale, window, softcap)
    return by_run(q, k, v, spans, scale=scale, window=window, softcap=softcap)


def _by_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    return torch.ops.sarm_cpu.attention(
        q.contiguous(), k, v, spans.queries, spans.ranges, scale, window or 0, softcap or 0.0
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, spans, scale, window, softcap) -> Tensor:
        q, k, v = (t.contiguous() for t in (q, k, v))
        out = _by_kernel(q, k, v, spans, scale, window, softcap)
        ctx.save_for_backward(q, k, v, out)
        ctx.problem = spans.queries, spans.ranges, scale, window or 0, softcap or 0.0
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        found = torch.ops.sarm_cpu.attention_backward(
            *ctx.saved_tensors, d_out.contiguous(), *ctx.problem
        )
        return *found, None, None, None, None


def by_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition in PyTorch: one scaled_dot_product_attention a run.

    q, k and v are split once at all borders: a slice for every run would be as exact, but the
    gradient of each slice is a zero tensor of the whole size.
    """
    runs = sorted(spans.queries.tolist())  # by first row in q
    if not runs:
        return torch.empty_like(q)
    owned = [spans.ranges[begin : begin + many].tolist() for *_, begin, many in runs]
    borders = sorted({0, len(k), *(b for own in owned for row, n in own for b in (row, row + n))})
    part_at = {border: i for i, border in enumerate(borders)}
    parts = [t.split([b - a for a, b in itertools.pairwise(borders)]) for t in (k, v)]
    queries = q.split([count for _, count, *_ in runs])
    outs = []
    for rows, (_, count, position, *_), own in zip(queries, runs, owned, strict=True):
        keys, values = (
            torch.cat([p for row, n in own for p in t[part_at[row] : part_at[row + n]]])
            for t in parts
        )
        length = position + count  # a range may reach beyond the last query
        query, key, value = (
            t.transpose(0, 1)[None] for t in (rows, keys[:length], values[:length])
        )
        whole = position == 0 and window is None
        mask = None
        if softcap is not None or window is not None or (position and count > 1):
            mask = spans.mask(position, count, window, q.dtype, q.device)
        if softcap is None:
            found = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=whole and count > 1,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        else:
            assert mask is not None
            found = _softcapped(query, key, value, mask, scale, softcap)
        outs.append(found[0].transpose(0, 1))
    return torch.cat(outs)


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap)
    scores = scores + mask
    return scores.softmax(-1, dtype=accumulate_dtype(q.dtype)).to(q.dtype) @ v


@functools.cache
def has_kernels() -> bool:
    """Whether the C++ extension with the CPU kernels is there."""
    return cpu.unavailable() is None


# ---- flash-attn ----------------------------------------------------------------------------


@functools.cache
def _flash_attn():
    """flash_attn's varlen function, or None."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One varlen call: each run's keys are gathered, prefixes once a run that shares them.

    The copies are 2 G D numbers a key, the products 2 H D times the run's queries: less than one
    percent as soon as a run has a hundred queries. flash_attn aligns the causal mask to the lower
    right, so keys are cut at the last query.
    """
    at = spans.varlen_on(q.device)
    out = torch.empty_like(q)
    out[at.q_rows] = _flash_attn()(
        q[at.q_rows],
        k[at.k_rows],
        v[at.k_rows],
        at.cu_q,
        at.cu_k,
        at.max_q,
        at.max_k,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out
