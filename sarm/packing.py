"""Batches without waste: similar lengths together, right-padded, no attention mask.

With causal attention a token never looks to its right, so padding on the right cannot reach a real
token and no mask is needed: PyTorch keeps its fast causal path. Identical sequences run once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sarm.errors import InputError

#: Padded tokens in one forward pass; a CPU gains nothing beyond a few thousand.
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32768}


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that rows x longest <= max_tokens, longest first.

    The longest batch comes first: if memory does not suffice it shows at once. A sequence longer
    than max_tokens is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) ids padded with 0 on the right and (B,) lengths."""
    lengths = torch.tensor([len(r) for r in rows], dtype=torch.long)
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids.to(device), lengths.to(device)


def last_state(backbone, ids: Tensor, lengths: Tensor) -> Tensor:
    """(B, d_model) residual stream at the last real token of right-padded ids (B, T)."""
    if len(ids) == 0:  # transformers' attention cannot reshape an empty batch
        return torch.empty(0, backbone.config.hidden_size, dtype=backbone.dtype, device=ids.device)
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(ids), device=ids.device), lengths - 1]


def iter_last_states(
    backbone, rows: Sequence[Sequence[int]], max_tokens: int | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields (indices, (len(indices), d_model) fp32 states on the CPU), a batch at a time.

    Args:
        rows: token ids of every sequence; none may be empty.
        max_tokens: padded tokens a forward pass; default by device.
    Raises:
        InputError: an empty sequence or an id outside the vocabulary.
    """
    check_ids(rows, backbone.config.vocab_size)
    device = backbone.device
    max_tokens = max_tokens or TOKENS_PER_BATCH.get(device.type, 8192)
    twins: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        twins.setdefault(tuple(row), []).append(i)
    unique = list(twins)
    for batch in plan_batches([len(r) for r in unique], max_tokens):
        ids, lengths = pad_right([unique[i] for i in batch], device)
        with torch.inference_mode():
            states = last_state(backbone, ids, lengths).float().cpu()
        indices = [twins[unique[i]] for i in batch]
        counts = torch.tensor([len(group) for group in indices])
        yield [i for group in indices for i in group], states.repeat_interleave(counts, 0)


def check_ids(rows: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Every row is non-empty and of integers within the vocabulary, or InputError."""
    for i, row in enumerate(rows):
        if len(row) == 0:
            raise InputError(f"sequence {i}: no tokens")
        try:
            array("q", row)
        except (TypeError, OverflowError) as error:
            raise InputError(f"sequence {i}: token ids must be integers ({error})") from error
        low, high = min(row), max(row)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise InputError(f"sequence {i}: token id {bad} is not in [0, {vocab_size})")
