"""The SAE's loss as a module whose gradients are averaged over data ranks (DDP)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sarm.training.distributed.world import DATA, World


class _Loss(nn.Module):
    def __init__(self, sae: nn.Module, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.sae, self._loss = sae, loss

    def forward(self, *args: Any) -> Any:
        return self._loss(*args)


def data_parallel(sae: nn.Module, loss: Callable[..., Any], world: World) -> Callable[..., Any]:
    """`loss`, a function of the SAE's parameters, such that `backward` averages over data ranks."""
    if world.data_ranks == 1:
        return loss
    assert world.mesh is not None
    return DistributedDataParallel(
        _Loss(sae, loss),
        process_group=world.mesh.get_group(DATA),
        broadcast_buffers=False,
        gradient_as_bucket_view=True,  # two matrices of 1 GiB need no second copy
    )


class NoLog:
    """What the ranks beside rank 0 write."""

    def start(self, step: int) -> None:
        """Nothing."""

    def write(self, metrics: dict[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
