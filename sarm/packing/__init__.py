"""From token sequences to the state of each one's last token, without wasted work.

tree.py          what sequences begin with in common is there once
reuse.py         what an earlier call has computed is not computed again
prefix_cache.py  where its keys and values are
plan.py          forward passes of bounded size
budget.py        passes that memory does not suffice for are halved
blocks.py        a decoder's layers on matrices of tokens: transformers' own, or 8-bit ones
forward.py       the decoder over a packed tree; the last layer for scored tokens only
tails.py         the states of several last tokens of every sequence
padded.py        the transformers forward on right-padded rows, for what cannot be packed
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from sarm.errors import InputError
from sarm.locks import lock_of
from sarm.packing.blocks import unpackable
from sarm.packing.budget import Budget, is_out_of_memory, run_each
from sarm.packing.forward import PackedDecoder
from sarm.packing.padded import Batch, last_state, pad_right, plan_batches, run_padded
from sarm.packing.plan import plan_passes
from sarm.packing.prefix_cache import CacheStats, PrefixCache
from sarm.packing.reuse import remaining_tree
from sarm.packing.tails import iter_tail_states
from sarm.packing.tree import prefix_tree

__all__ = [
    "Budget",
    "CacheStats",
    "PrefixCache",
    "check_ids",
    "is_out_of_memory",
    "iter_last_states",
    "iter_tail_states",
    "iter_token_states",
    "last_state",
    "last_states",
    "pad_right",
    "plan_batches",
    "plan_passes",
    "prefix_tree",
]

#: Tokens in one forward pass; a CPU gains nothing beyond a few thousand.
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32768}

Group = tuple[int, ...]  # identical rows


def iter_last_states(
    backbone,
    rows: Sequence[Sequence[int]],
    max_tokens: int | None = None,
    *,
    cache: PrefixCache | None = None,
    budget: Budget | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields (indices, (len(indices), d_model) fp32 states on the CPU), a pass at a time.

    What rows begin with in common runs once, identical rows as well. The longest come first. A
    pass that does not fit into memory is run in halves. Several threads may do this on one
    backbone: its passes run one at a time.

    Args:
        rows: token ids of every sequence; none may be empty.
        max_tokens: tokens a forward pass; default by device. A longer sequence takes several
            passes. (Architectures that cannot be packed: padded tokens, a sequence one pass.)
        cache: keys and values of earlier calls' prefixes; used where sequences can be packed.
        budget: the pass size that has been found to fit, for later calls to begin with.
    Raises:
        InputError: an empty sequence, an id outside the vocabulary, or a pass of the smallest size
            (a token; a padded sequence) that does not fit into memory.
    """
    check_ids(rows, backbone.config.vocab_size)
    limit = max_tokens or TOKENS_PER_BATCH.get(backbone.device.type, 8192)
    if cache is not None and not cache.max_bytes:
        cache = None
    for groups, states in _runs(backbone, rows, limit, cache, budget or Budget()):
        if not groups:  # a part of a long sequence
            continue
        counts = torch.tensor([len(group) for group in groups])
        states = states.float().cpu().repeat_interleave(counts, 0)
        yield [i for group in groups for i in group], states


def last_states(backbone, rows: Sequence[Sequence[int]], max_tokens: int | None = None) -> Tensor:
    """(N, d_model) fp32 states of the rows' last tokens, in order; see `iter_last_states`."""
    out = torch.empty(len(rows), backbone.config.hidden_size)
    for indices, states in iter_last_states(backbone, rows, max_tokens):
        out[indices] = states
    return out


def iter_token_states(
    backbone, rows: Sequence[Sequence[int]], max_tokens: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yields (index, (len(rows[index]), d_model) fp32 states on the CPU) of every row.

    What rows begin with in common runs once; see `iter_tail_states`.
    """
    check_ids(rows, backbone.config.vocab_size)
    limit = max_tokens or TOKENS_PER_BATCH.get(backbone.device.type, 8192)
    longest = max(map(len, rows), default=1)
    for indices, found in iter_tail_states(backbone, rows, longest, limit):
        for i, states in zip(indices, found, strict=True):
            yield i, states.float().cpu()


def _runs(
    backbone,
    rows: Sequence[Sequence[int]],
    limit: int,
    cache: PrefixCache | None,
    budget: Budget,
) -> Iterator[tuple[list[Group], Tensor]]:
    """Yields (groups of identical rows, one state a group)."""
    nodes = prefix_tree(rows)
    max_tokens, turn = budget.tokens(limit), lock_of(backbone)

    def relieve() -> None:
        if cache is not None:
            cache.clear()
        _empty_cache()

    if unpackable(backbone):
        groups = [node.rows for node in nodes if node.rows]
        firsts = [rows[group[0]] for group in groups]
        batches = [
            Batch(batch, len(batch) * len(firsts[batch[0]]))
            for batch in plan_batches([len(row) for row in firsts], max_tokens)
        ]

        def pad_and_run(batch: Batch, after: Batch | None) -> tuple[list[Group], Tensor]:
            states = run_padded(backbone, [firsts[i] for i in batch.rows])
            return [groups[i] for i in batch.rows], states

        yield from run_each(batches, pad_and_run, budget, limit, turn=turn, relieve=relieve)
        return
    with (
        remaining_tree(cache, backbone, nodes)
        if cache is not None
        else nullcontext(nodes) as remaining
    ):
        decoder = PackedDecoder(backbone)
        passes = plan_passes(remaining, max_tokens)
        for pieces, states in run_each(
            passes, decoder.run, budget, limit, turn=turn, relieve=relieve
        ):
            yield [piece.rows for piece in pieces], states


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
