"""`train-rm --mode head` in several processes: states are computed together, rank 0 solves."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from sarm.data import PreferencePair
from sarm.states import StateCache
from sarm.tokens import ConversationEncoder
from sarm.training.distributed.world import launched, naming_lost_ranks, share, timeout_s


def extract_together(
    pairs: Sequence[PreferencePair], encoder: ConversationEncoder, path: Path, backbone
) -> bool:
    """Put every process's share of the conversations' states into the cache that all see.

    Returns:
        Whether this process is to go on and solve: rank 0, after all have finished.
    """
    rank, size = launched()
    if size == 1:
        return True
    mine = pairs[share(len(pairs), rank, size)]  # neighbours share prompts
    sides = [side for pair in mine for side in (pair.chosen, pair.rejected)]
    rows = [encoded.ids for encoded in encoder.encode(sides)]
    with naming_lost_ranks():
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s()))
        try:
            if rank == 0:
                StateCache(path, backbone).close()  # one process makes the file
            dist.barrier()
            with StateCache(path, backbone) as cache:
                if rows:
                    cache.states(rows)
            dist.barrier()
        finally:
            dist.destroy_process_group()
    return rank == 0
