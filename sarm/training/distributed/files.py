"""Tensors of all shards into one safetensors file, tensor by tensor, and back into any shards.

The file is what one process would have written: it knows nothing of shards, so a run goes on with
another number of them. Rank 0 holds one whole tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from sarm.training.distributed.world import LATENTS, World

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def gathered(tensor: Tensor, dim: int | None, world: World) -> Tensor | None:
    """A tensor of all shards, on the CPU of rank 0; None elsewhere.

    Args:
        dim: 0 or 1, along which shards follow one another; None: it is the same on all.
    """
    if dim is None or world.shards == 1:
        return tensor.cpu() if world.main else None
    if world.data_rank:  # holds what data rank 0 holds
        return None
    assert world.mesh is not None
    rows = tensor.transpose(0, dim).contiguous()
    parts = [torch.empty_like(rows) for _ in range(world.shards)] if world.main else None
    dist.gather(rows, parts, dst=0, group=world.mesh.get_group(LATENTS))
    return None if parts is None else torch.cat([p.cpu() for p in parts]).transpose(0, dim)


def save_sharded(
    path: Path,
    tensors: Mapping[str, Tensor],
    dim_of: Callable[[str], int | None],
    metadata: dict[str, str],
    world: World,
) -> None:
    """Write `path` on rank 0; all processes call this with the same names in the same order.

    Args:
        tensors: this shard's.   dim_of: see `gathered`.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        dim, shape = dim_of(name), list(tensor.shape)
        if dim is not None:
            shape[dim] *= world.shards
        begin, end = end, end + torch.Size(shape).numel() * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    file = open(path, "wb") if world.main else None  # noqa: SIM115
    try:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            whole = gathered(tensor.detach(), dim_of(name), world)
            if file is not None and whole is not None:
                write_tensor(file, whole)
    finally:
        if file is not None:
            file.close()


def write_tensor(file: IO[bytes], tensor: Tensor) -> None:
    """The elements in row-major order."""
    tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)


def load_shards(path: Path, dim_of: Callable[[str], int | None], world: World) -> dict[str, Tensor]:
    """This shard's part of every tensor; only that part is read."""
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # no mapping
            dim = dim_of(name)
            if dim is None or world.shards == 1:
                found[name] = file.get_tensor(name)
                continue
            part = file.get_slice(name)
            size = part.get_shape()[dim] // world.shards
            mine = slice(size * world.shard, size * (world.shard + 1))
            found[name] = part[mine] if dim == 0 else part[:, mine]
    return found
