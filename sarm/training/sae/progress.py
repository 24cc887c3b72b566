"""The checkpoint of a run: one file, one rename; and whose run a folder holds.

It is written at the end of a chunk, so what happens within one (the batch, the sums of a log line)
is never part of it; a resumed run learns the chunk in progress again, from the same states.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sarm.checkpoint import read_metadata, replace_file, replace_files
from sarm.errors import InputError
from sarm.training.distributed.files import load_shards, save_sharded
from sarm.training.distributed.sharded_sae import shard_dim

if TYPE_CHECKING:
    from sarm.training.sae.trainer import SaeTrainer

CHECKPOINT = "trainer.safetensors"  # its metadata holds the place in the corpus
RUN_FILE = "run.json"  # what the folder's run is, written before anything is computed
PLACE = ("step", "chunk", "documents", "states", "tokens", "seconds")


def save(trainer: SaeTrainer) -> None:
    """Weights, their average, optimiser, silent latents and place, written whole or not at all."""
    tensors, values = trainer.optimizer.state()
    tensors = {f"optimizer/{name}": tensor for name, tensor in tensors.items()}
    tensors |= {f"sae/{name}": tensor for name, tensor in trainer.sae.state_dict().items()}
    if trainer.average.sae is not trainer.sae:
        tensors |= {f"ema/{n}": tensor for n, tensor in trainer.average.sae.state_dict().items()}
    tensors |= {"mean": trainer.mean, "std": trainer.std}
    tensors |= {"last": trainer.firing.last, "last_scored": trainer.firing.last_scored}
    record = {
        "place": {name: getattr(trainer, name) for name in PLACE},
        "seen": [trainer.firing.seen, trainer.firing.seen_scored],
        "averages": trainer.average.updates,
        "optimizer": values,
        "last": trainer.final,
    }
    metadata = {"record": json.dumps(record)}
    if trainer.world.shards > 1:
        with replace_files(trainer.work) if trainer.world.main else nullcontext() as staging:
            path = (staging or trainer.work) / CHECKPOINT
            save_sharded(path, tensors, shard_dim, metadata, trainer.world)
        return
    if not trainer.world.main:
        return
    # clones: safetensors refuses tensors that share memory (8-bit states share their tables)
    plain = {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}
    with replace_files(trainer.work) as staging:
        save_file(plain, staging / CHECKPOINT, metadata)


@torch.no_grad()
def load(trainer: SaeTrainer) -> bool:
    """Take up a killed run's checkpoint, if there is one."""
    path = trainer.work / CHECKPOINT
    if not trainer.world.from_main(path.is_file):
        return False
    record: dict[str, Any] = json.loads(read_metadata(path)["record"])
    tensors = load_shards(path, shard_dim, trainer.world)

    def under(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    trainer.sae.load_state_dict(under("sae/"))
    if trainer.average.sae is not trainer.sae:
        trainer.average.sae.load_state_dict(under("ema/"))
    trainer.optimizer.load_state(under("optimizer/"), record["optimizer"])
    trainer.mean, trainer.std = tensors["mean"], tensors["std"]
    trainer.firing.last.copy_(tensors["last"])
    trainer.firing.last_scored.copy_(tensors["last_scored"])
    trainer.firing.seen, trainer.firing.seen_scored = record["seen"]
    trainer.average.updates = record["averages"]
    for name in PLACE:
        setattr(trainer, name, record["place"][name])
    trainer.final = record["last"]
    return True


def claim(out: Path, work: Path, run: dict[str, Any]) -> None:
    """Note in `work` which run this is; refuse a folder that holds another one."""
    path = work / RUN_FILE
    if not path.is_file():
        with replace_file(path) as file:
            json.dump(run, file, indent=2)
        return
    earlier = json.loads(path.read_text("utf-8"))
    different = [name for name, value in run.items() if earlier.get(name) != value]
    if different:
        theirs, ours = (
            ", ".join(f"{name}={side.get(name)!r}" for name in different) for side in (earlier, run)
        )
        raise InputError(
            f"{out}: holds a run with {theirs}, this one has {ours}; "
            f"choose another folder or delete {work}"
        )
