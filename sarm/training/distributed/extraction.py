"""Residual states of a corpus, every process running its share of the documents.

All processes end up with the same chunks as one process would collect: a piece of a few thousand
states is cut into parts of equal cost, each process runs one through its own copy of the backbone,
and the states are exchanged. So shuffling, batches and statistics are those of one process, for
8 d_model bytes a state of traffic. Files are rank 0's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sarm.errors import InputError
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

    def _write_piece(
        self, path: Path, states: Tensor, kinds: Tensor, documents: int, tokens: int
    ) -> None:
        write = super()._write_piece
        self.world.from_main(lambda: write(path, states, kinds, documents, tokens))

    def _keep_only(self, start: int | None) -> None:
        if self.world.main:
            super()._keep_only(start)

    def _remove(self, place: Path) -> None:
        if self.world.main:
            super()._remove(place)

    def _finished_pieces(self, start: int) -> tuple[list[Path], int, int, int]:
        find = super()._finished_pieces
        return self.world.from_main(lambda: find(start))

    def _joined(self, paths: list[Path], have: int, limit: int | None) -> tuple[Tensor, Tensor]:
        """Read by rank 0, whose disk has the pieces, and sent to all."""
        count = have if limit is None else min(have, limit)
        if self.world.main:
            states, kinds = super()._joined(paths, have, limit)
        else:
            states = torch.empty(count, self.backbone.config.hidden_size)
            kinds = torch.empty(count, dtype=torch.uint8)
        states, kinds = states.to(self.device), kinds.to(self.device)
        dist.broadcast(states, 0)
        dist.broadcast(kinds, 0)
        return states.cpu(), kinds.cpu()


def stream_of(
    world: World,
    backbone,
    end_id: int | None,
    folder: Path,
    states: int,
    cache: StateCache | None,
    prefetch: bool | None = None,
) -> StateStream:
    """The stream of a world, of one process too.

    prefetch: None: on a GPU; never with others, whose exchanges come in one order.
    """
    if world.size > 1:
        if prefetch:
            raise InputError("train-sae: --prefetch works in one process, not among several")
        return SharedStateStream(backbone, end_id, folder, states, cache=cache, world=world)
    ahead = backbone.device.type == "cuda" if prefetch is None else prefetch
    return StateStream(backbone, end_id, folder, states, cache=cache, prefetch=ahead)


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
