"""Reward models in several processes: whose pairs are whose, and the loss of all of them.

A step's pairs are cut into micro-batches as one process would cut them; process r of P takes
number r, r + P, r + 2 P, ... Where an epoch's last step leaves a process without one, it gets a
pair that counts nothing, so that all take part in every exchange of gradients. Losses are weighed
by pairs over the pairs of the step, of all processes: the curve is that of one process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from sarm.training.collate import EncodedPair, PairDataset, collate

FILLER = ""  # `where` of a pair that counts nothing


class FilledPairs(Dataset):
    """A `PairDataset`; indices from its length on give a filler."""

    def __init__(self, pairs: PairDataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> EncodedPair:
        if index < len(self.pairs):
            return self.pairs[index]
        return dataclasses.replace(self.pairs[0], where=FILLER)


class PairOrder(Sampler):
    """A permutation of n pairs an epoch, filled up to a multiple of `block`.

    epoch: asked at the beginning of each; the order depends on it and the seed alone, so any
    number of processes sees the same.
    """

    def __init__(self, n: int, block: int, seed: int, epoch: Callable[[], int]) -> None:
        self.n, self.block, self.seed, self.epoch = n, block, seed, epoch

    def __len__(self) -> int:
        return -(-self.n // self.block) * self.block

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed((self.seed << 20) + self.epoch())
        yield from torch.randperm(self.n, generator=draw).tolist()
        yield from range(self.n, len(self))


def collate_filled(pairs: Sequence[EncodedPair]) -> dict[str, Any]:
    """`collate` of the pairs that count; of one filler if none does."""
    return collate([p for p in pairs if p.where != FILLER] or pairs[:1])


def counted(batch: dict[str, Any]) -> int:
    """How many pairs of a batch count."""
    return sum(where != FILLER for where in batch["where"])
