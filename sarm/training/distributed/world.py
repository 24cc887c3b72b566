"""The processes of a run as a grid, data x latents, and what they tell each other.

    rank  0 1 2 3 4 5 6 7        4 data ranks x 2 shards: ranks 0 and 1 learn from the same rows
    data  0 0 1 1 2 2 3 3        of a batch, rank 0 with the first half of the latents, rank 1
    shard 0 1 0 1 0 1 0 1        with the second; shards are neighbours, where links are fastest

A process that runs alone is a grid of one: every method is then the identity.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from sarm.errors import InputError, first_line

T = TypeVar("T")

TIMEOUT = "SARM_TIMEOUT_S"
DATA, LATENTS = "data", "latents"


def timeout_s() -> int:
    """Seconds a process waits for the others: $SARM_TIMEOUT_S, else 600."""
    text = os.environ.get(TIMEOUT, "600")
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{TIMEOUT} must be a whole number of seconds, got {text!r}")
    return int(text)


def launched() -> tuple[int, int]:
    """(rank, world size) as torchrun or accelerate set them; (0, 1) without either."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_device() -> torch.device:
    """The GPU of this process, made current; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


class World:
    """This process's place in the grid.

    Args:
        mesh: of dimensions "data" and "latents"; None: this process is alone.

    Attributes: rank, size; data_rank, data_ranks; shard, shards; main: whether this is rank 0,
    which alone writes files and prints.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if mesh else (0, 1)
        self.data_rank, self.data_ranks = (
            (mesh.get_local_rank(DATA), mesh.size(0)) if mesh else (0, 1)
        )
        self.shard, self.shards = (mesh.get_local_rank(LATENTS), mesh.size(1)) if mesh else (0, 1)

    @property
    def main(self) -> bool:
        """Rank 0."""
        return self.rank == 0

    @classmethod
    @contextlib.contextmanager
    def joined(cls, shards: int = 1) -> Iterator[World]:
        """The grid of the processes that were launched with this one, left at the end.

        Raises:
            InputError: the number of processes is no multiple of `shards`.
            ConnectionError: another process stopped, or did not answer in time.
        """
        rank, size = launched()
        if shards < 1 or size % shards:
            raise InputError(
                f"shards must divide the number of processes, which is {size}, got {shards} "
                "(torchrun --nproc-per-node sets it)"
            )
        if size == 1:
            yield cls()
            return
        device = own_device()
        # both: states and checkpoints are on the CPU, weights and gradients on the GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with naming_lost_ranks():
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s()))
            try:
                yield cls(grid(device.type, shards))
            finally:
                dist.destroy_process_group()

    def __deepcopy__(self, memo: dict) -> World:
        return self  # a process group cannot be copied, and a copied SAE lives in the same grid

    # ---- the share of this process -----------------------------------------------------------

    def rows(self, count: int) -> slice:
        """Of `count` rows of a batch those that this data rank learns from; sizes differ by 1."""
        return share(count, self.data_rank, self.data_ranks)

    # ---- sums without a gradient ---------------------------------------------------------------

    def sum_data(self, tensor: Tensor) -> Tensor:
        """The sum over data ranks."""
        return self._reduced(tensor, DATA, dist.ReduceOp.SUM)

    def max_data(self, tensor: Tensor) -> Tensor:
        """The maximum over data ranks."""
        return self._reduced(tensor, DATA, dist.ReduceOp.MAX)

    def sum_latents(self, tensor: Tensor) -> Tensor:
        """The sum over shards."""
        return self._reduced(tensor, LATENTS, dist.ReduceOp.SUM)

    def mean_latents(self, value: float) -> float:
        """The mean over shards, which are of one size."""
        return float(self.sum_latents(torch.tensor(value, dtype=torch.float64))) / self.shards

    def _reduced(self, tensor: Tensor, name: str, how: Any) -> Tensor:
        if self.mesh is None or self.mesh[name].size() == 1:
            return tensor
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor, how, group=self.mesh.get_group(name))
        return tensor

    def all_latents(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The shards' tensors, of one shape, behind one another."""
        if self.shards == 1:
            return tensor
        assert self.mesh is not None
        parts = [torch.empty_like(tensor) for _ in range(self.shards)]
        dist.all_gather(parts, tensor.contiguous(), group=self.mesh.get_group(LATENTS))
        return torch.cat(parts, dim)

    # ---- sums with a gradient: DTensor knows what flows back -------------------------------------

    def into_shards(self, tensor: Tensor) -> Tensor:
        """The tensor itself, equal on all shards; its gradient is the sum of the shards'."""
        if self.shards == 1:
            return tensor
        assert self.mesh is not None
        same = DTensor.from_local(tensor, self.mesh[LATENTS], [Replicate()], run_check=False)
        return same.to_local(grad_placements=[Partial()])

    def from_shards(self, tensor: Tensor) -> Tensor:
        """The sum over shards; each gets the whole gradient, as all compute the same with it."""
        if self.shards == 1:
            return tensor
        assert self.mesh is not None
        part = DTensor.from_local(tensor, self.mesh[LATENTS], [Partial()], run_check=False)
        return part.redistribute(placements=[Replicate()]).to_local()

    # ---- agreement ----------------------------------------------------------------------------

    def from_main(self, call: Callable[[], T]) -> T:
        """What `call` returns on rank 0, on all; its InputError is raised on all."""
        if self.mesh is None:
            return call()
        found: list[Any] = [None, None]
        if self.main:
            try:
                found[0] = call()
            except (InputError, OSError) as error:
                found[1] = error
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        if found[1] is not None:
            raise found[1]
        return found[0]


def grid(device: str, shards: int) -> DeviceMesh:
    """All processes as (data ranks, shards)."""
    return init_device_mesh(
        device, (dist.get_world_size() // shards, shards), mesh_dim_names=(DATA, LATENTS)
    )


def share(count: int, rank: int, ranks: int) -> slice:
    """The part of a list of `count` that belongs to a rank; sizes differ by at most one."""
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


@contextlib.contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Failed communication as one line: which process noticed it, and what to do.

    Raises:
        ConnectionError: instead of what torch.distributed raised.
    """
    rank, size = launched()
    try:
        yield
    except RuntimeError as error:  # DistError is one; gloo raises plain ones
        if not _is_communication(error):
            raise
        raise ConnectionError(
            f"rank {rank} of {size}: another process stopped or did not answer within "
            f"{timeout_s()} s ({first_line(error)}); the last checkpoint is kept: start the same "
            "command again, with any number of processes"
        ) from error


@contextlib.contextmanager
def leaving_group() -> Iterator[None]:
    """A process group that was begun within, by Accelerate for one, is left at the end."""
    member = dist.is_initialized()
    try:
        yield
    finally:
        if dist.is_initialized() and not member:
            dist.destroy_process_group()


def _is_communication(error: RuntimeError) -> bool:
    words = ("Connection closed by peer", "Connection reset", "Timed out", "timed out", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
