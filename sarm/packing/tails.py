"""The states of the last tokens of every sequence, as many as asked for, by the packed engine.

What `iter_last_states` does for one token a sequence: every token passes the layers once, shared
prefixes once for all, and the last layer's queries, output projection and MLP run for the wanted
tokens only. A tail of 64 tokens of 400 costs 64 / 400 of one layer more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sarm.locks import lock_of
from sarm.packing.blocks import unpackable
from sarm.packing.budget import Budget, run_each
from sarm.packing.forward import PackedDecoder
from sarm.packing.padded import Batch, pad_right, plan_batches
from sarm.packing.plan import Piece, plan_passes
from sarm.packing.tree import prefix_tree


def iter_tail_states(
    backbone,
    rows: Sequence[Sequence[int]],
    tail: int,
    max_tokens: int,
    *,
    budget: Budget | None = None,
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yields (rows, for each its (min(tail, len(row)), d_model) states, the scored token last).

    A pass at a time, every row once; states are on the backbone's device. What later rows share
    is kept meanwhile: at most (rows, tail, d_model).

    Args:
        rows: token ids of every sequence; checked (`check_ids`).
        tail: how many tokens of each sequence, from its end; at least 1.
        max_tokens, budget: as for `iter_last_states`.
    Raises:
        InputError: a pass of the smallest size does not fit into memory.
    """
    budget = budget or Budget()
    limit, turn = budget.tokens(max_tokens), lock_of(backbone)
    if unpackable(backbone):
        batches = [
            Batch(batch, len(batch) * len(rows[batch[0]]))
            for batch in plan_batches([len(row) for row in rows], limit)
        ]
        run_batch = _padded(backbone, rows, tail)
        yield from run_each(batches, run_batch, budget, max_tokens, turn=turn)
        return
    passes = plan_passes(prefix_tree(rows), limit)
    for batch in passes:
        for piece in batch.pieces:
            _want(piece, rows, tail)
    kept: dict[Piece, Tensor] = {}
    run = PackedDecoder(backbone).run
    for pieces, states in run_each(passes, run, budget, max_tokens, turn=turn):
        parts = states.split([piece.end - piece.first_wanted for piece in pieces])
        kept.update(zip(pieces, parts, strict=True))
        done = [(row, piece) for piece in pieces for row in piece.rows]
        if done:
            found = [_assembled(p, kept, max(0, len(rows[row]) - tail)) for row, p in done]
            yield [row for row, _ in done], found


def _want(piece: Piece, rows: Sequence[Sequence[int]], tail: int) -> None:
    """Mark what the sequences that end with a piece want of it and of the pieces before it."""
    if not piece.rows:
        return
    start = max(0, len(rows[piece.rows[0]]) - tail)  # rows of one piece are identical
    for part in piece.path():
        if part.end <= start:
            break
        part.wanted = start if part.wanted is None else min(part.wanted, start)


def _assembled(piece: Piece, kept: dict[Piece, Tensor], start: int) -> Tensor:
    """The states of one sequence from position `start` on, of the pieces on its path."""
    parts = []
    for part in piece.path():
        if part.end <= start:
            break
        parts.append(kept[part][max(0, start - part.first_wanted) :])
    return torch.cat(parts[::-1])


Run = Callable[[Batch, Batch | None], tuple[list[int], list[Tensor]]]


def _padded(backbone, rows: Sequence[Sequence[int]], tail: int) -> Run:
    @torch.inference_mode()
    def run(batch: Batch, after: Batch | None) -> tuple[list[int], list[Tensor]]:
        ids, _ = pad_right([rows[i] for i in batch.rows], backbone.device)
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
        ends = [len(rows[i]) for i in batch.rows]
        return batch.rows, [
            h[max(0, end - tail) : end].clone() for h, end in zip(hidden, ends, strict=True)
        ]

    return run
