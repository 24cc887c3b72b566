"""Residual states of a corpus, every process running its share of the documents.

All processes end up with the same chunks as one process would collect: a piece of a few thousand
states is cut into parts of equal cost, each process runs one through its own copy of the backbone,
and the states are exchanged. So shuffling, batches and statistics are those of one process, for
4 d_model bytes a state of traffic. Files are rank 0's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sarm.states import StateCache
from sarm.training.activations import Window
from sarm.training.distributed.world import World, own_device
from sarm.training.stream import StateStream


class SharedStateStream(StateStream):
    """A `StateStream` of all processes of a world; all iterate it together.

    Arguments beside `world`: see `StateStream`.
    """

    def __init__(self, *args, world: World, **options) -> None:
        super().__init__(*args, **options)
        self.world, self.device = world, own_device()

    def _states(self, piece: list[Window]) -> Tensor:
        cuts = equal_parts([cost(window) for window in piece], self.world.size)
        counts = [sum(len(w.positions) for w in piece[cut]) for cut in cuts]
        mine = piece[cuts[self.world.rank]]
        width = self.backbone.config.hidden_size
        own = torch.zeros(max(counts), width, device=self.device)
        if mine:
            own[: counts[self.world.rank]] = super()._states(mine).to(self.device)
        parts = [torch.empty_like(own) for _ in counts]
        dist.all_gather(parts, own)
        return torch.cat([part[:n].cpu() for part, n in zip(parts, counts, strict=True)])

    def clear(self) -> None:
        """Forget the pieces of the chunk in progress."""
        if self.world.main:
            super().clear()

    def _write_piece(self, number: int, states: Tensor, kinds: Tensor, place: dict) -> None:
        if self.world.main:
            super()._write_piece(number, states, kinds, place)

    def _finished_pieces(self, start: int) -> tuple[list[tuple[Tensor, Tensor]], int, int]:
        base = super()._finished_pieces
        parts: list[tuple[Tensor, Tensor]] = []

        def read() -> tuple[list[int], int, int]:
            found, documents, tokens = base(start)
            parts.extend(found)
            return [len(states) for states, _ in found], documents, tokens

        counts, documents, tokens = self.world.from_main(read)
        if not self.world.main:
            width = self.backbone.config.hidden_size
            parts = [(torch.empty(n, width), torch.empty(n, dtype=torch.uint8)) for n in counts]
        for states, kinds in parts:
            dist.broadcast(states, 0)
            dist.broadcast(kinds, 0)
        return parts, documents, tokens


def stream_of(
    world: World, backbone, end_id: int | None, folder: Path, states: int, cache: StateCache | None
) -> StateStream:
    """The stream of a world, of one process too."""
    if world.size == 1:
        return StateStream(backbone, end_id, folder, states, cache=cache)
    return SharedStateStream(backbone, end_id, folder, states, cache=cache, world=world)


def cost(window: Window) -> int:
    """Tokens that a window takes through the backbone."""
    return len(window.ids) + (len(window.positions) if window.kind == "turn-end" else 0)


def equal_parts(costs: Sequence[int], ranks: int) -> list[slice]:
    """A cut of a list into runs, one a rank, of nearly equal cost."""
    done, whole = list(accumulate(costs)), sum(costs)
    bounds = [0]
    for rank in range(1, ranks):
        goal = whole * rank / ranks
        bounds.append(max(bounds[-1], sum(d <= goal for d in done)))
    return [slice(a, b) for a, b in zip(bounds, [*bounds[1:], len(costs)], strict=True)]
