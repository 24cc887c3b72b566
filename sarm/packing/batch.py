"""Sequences packed into one forward pass, and the tokens whose states are wanted of each.

    T  packed tokens, every shared prefix once    n  wanted tokens    B  sequences

Wanted is the end of every sequence from some token on: the last turn, or the last token alone. In
the prefix tree these are the ends of pieces, so a wanted token that several sequences share is
there once, with the sum of their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sarm.attention import Spans
from sarm.packing.forward import Layout
from sarm.packing.plan import Piece, plan_passes
from sarm.packing.tree import prefix_tree


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One pass over B sequences; index tensors are int64.

    ids, positions: (T,).  spans: attention of all T tokens.  wanted: (n,) rows among the T;
    wanted_spans: their attention.  weights: (n,) fp32, summed over sequences that want the token.
    scored: (B,) where each sequence's last token stands among the n wanted ones.
    """

    ids: Tensor
    positions: Tensor
    spans: Spans
    wanted: Tensor
    wanted_spans: Spans
    weights: Tensor
    scored: Tensor

    @classmethod
    def of(
        cls,
        rows: Sequence[Any],
        starts: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ) -> PackedBatch:
        """Pack token sequences, none empty.

        Args:
            rows: sequences or arrays of integers.
            starts: first wanted token of every sequence; None: the last token alone.
            weights: of each sequence's wanted tokens; None: 1.
        """
        starts = [len(row) - 1 for row in rows] if starts is None else starts
        tokens = sum(len(row) for row in rows)
        (batch,) = plan_passes(prefix_tree(rows), tokens)
        layout = Layout(batch, {})
        wanting = _rows_by_piece(batch.pieces)
        first_wanted = np.asarray(starts)
        weight_of = np.ones(len(rows)) if weights is None else np.asarray(weights)
        wanted, summed, runs = [], [], []
        scored = [0] * len(rows)
        count = 0
        for piece in batch.pieces:
            own = first_wanted[wanting[piece]]
            first, end = piece.start, piece.start + len(piece.tokens)
            begin = max(first, int(own.min()))
            if begin >= end:
                continue
            row = layout.own(piece)[0] + begin - first
            wanted.append(torch.arange(row, row + end - begin))
            summed.append(weight_of[wanting[piece]] @ (own[:, None] <= np.arange(begin, end)))
            runs.append((count, end - begin, begin, layout.ranges(piece)))
            count += end - begin
            for i in piece.rows:
                scored[i] = count - 1
        return cls(
            ids=layout.ids,
            positions=layout.positions,
            spans=layout.spans,
            wanted=torch.cat(wanted),
            wanted_spans=Spans.of(runs),
            weights=torch.from_numpy(np.concatenate(summed)).float(),
            scored=torch.tensor(scored),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """A copy whose tensors are on a device; spans stay on the CPU, where they are read."""
        names = ("ids", "positions", "wanted", "weights", "scored")
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in names}
        return replace(self, **moved)


def _rows_by_piece(pieces: Sequence[Piece]) -> dict[Piece, list[int]]:
    """For every piece, the sequences that run through it."""
    found: dict[Piece, list[int]] = {piece: [] for piece in pieces}
    for piece in pieces:
        above: Piece | None = piece
        while above is not None and piece.rows:
            found[above] += piece.rows
            above = above.parent
    return found
