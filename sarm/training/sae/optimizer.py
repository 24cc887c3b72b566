"""Adam for an SAE: unit decoder rows, clipping, states in 32, 16 or 8 bits.

The optimiser sees every parameter latent by latent (the decoder as its transpose, which is how it
lies in memory), so "the state of a latent" is a row in each of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sarm.errors import InputError
from sarm.sae import TopKSAE
from sarm.training.distributed.world import World
from sarm.training.sae.adam_bf16 import AdamBf16

BETAS = (0.9, 0.999)


class SaeOptimizer:
    """Projects and clips gradients, steps, puts decoder rows back to unit length.

    Args:
        sae: on its device already; its parameters must not be replaced afterwards.
        kind: "adam", "adam-bf16" or "adam-8bit".
        clip: greatest gradient norm, or None.
        seed: of the stochastic rounding of "adam-bf16".
        world: whose shards hold the other latents.
    Raises:
        InputError: "adam-8bit" with shards: its blocks would depend on their number.
    """

    def __init__(
        self,
        sae: TopKSAE,
        kind: str,
        clip: float | None,
        seed: int = 0,
        world: World | None = None,
    ) -> None:
        self.sae, self.clip, self.world = sae, clip, world or World()
        if kind == "adam-8bit" and self.world.shards > 1:
            raise InputError("train-sae: adam-8bit cannot be sharded; use adam or adam-bf16")
        self._rows = {  # parameters that share the SAE's memory
            name: nn.Parameter(_by_latent(name, p.detach())) for name, p in sae.named_parameters()
        }
        assert all(p.is_contiguous() for p in self._rows.values())
        self.adam = _adam(kind, list(self._rows.values()), seed + self.world.shard)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Hand over the SAE's gradients, projected and clipped; their norm before clipping.

        A unit row cannot change its length: the part of its gradient along it would only inflate
        Adam's second moments, and renormalising would undo it.
        """
        for name, parameter in self.sae.named_parameters():
            grad = parameter.grad
            self._rows[name].grad = None if grad is None else _by_latent(name, grad).contiguous()
            parameter.grad = None
        rows = self._rows["decoder.weight"]
        assert rows.grad is not None
        rows.grad -= (rows.grad * rows).sum(1, keepdim=True) * rows
        limit = self.clip if self.clip is not None else float("inf")
        parameters = list(self._rows.values())
        if self.world.shards == 1:
            return nn.utils.clip_grad_norm_(parameters, limit)
        common = self._rows["pre_bias"]
        own = [p.grad for p in parameters if p is not common and p.grad is not None]
        squares = self.world.sum_latents(nn.utils.get_total_norm(own).square())
        if common.grad is not None:
            squares = squares + common.grad.square().sum()
        norm = squares.sqrt()
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step with the gradients handed over, then unit decoder rows."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        rows = self._rows["decoder.weight"].data
        rows /= rows.norm(dim=1, keepdim=True).clamp_min(1e-12)

    @torch.no_grad()
    def forget(self, latents: Tensor) -> None:
        """No momentum for these latents; second moments as the mean latent's.

        With second moments of zero Adam's first steps are up to six times too long, and latents
        that had just come back died again. (In 8 bits, whose scales span latents, they are zero.)
        """
        for name, parameter in self._rows.items():
            if name == "pre_bias":
                continue
            state = self.adam.state[parameter]
            for key, tensor in state.items():
                if torch.is_tensor(tensor) and tensor.shape == parameter.shape:
                    if key == "exp_avg_sq":
                        mean = self.world.sum_latents(tensor.float().mean(0)) / self.world.shards
                        tensor[latents] = mean.to(tensor.dtype)
                    else:
                        tensor[latents] = _zero_of(state, key, tensor)

    # ---- for checkpoints -------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain values) of all states, named `parameter/key`."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for name, parameter in self._rows.items():
            for key, value in self.adam.state[parameter].items():
                kind = tensors if torch.is_tensor(value) else values
                kind[f"{name}/{key}"] = value
        return tensors, values

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """What `state` returned."""
        self.adam.state.clear()
        for full, value in {**tensors, **values}.items():
            name, key = full.split("/")
            parameter = self._rows[name]
            if torch.is_tensor(value):
                value = value.to(parameter.device)
            self.adam.state[parameter][key] = value


def _by_latent(name: str, tensor: Tensor) -> Tensor:
    return tensor.t() if name == "decoder.weight" else tensor


def _zero_of(state: dict, key: str, tensor: Tensor) -> int:
    """The code of zero: in 8 bits (signed first, unsigned second moments) it is not 0."""
    if tensor.dtype != torch.uint8:
        return 0
    return int((state[key.replace("state", "qmap")] == 0).nonzero()[0])


def _adam(kind: str, parameters: list[nn.Parameter], seed: int) -> torch.optim.Optimizer:
    if kind == "adam-bf16":
        return AdamBf16(parameters, betas=BETAS, seed=seed)
    if kind == "adam-8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise InputError(
                "train-sae: optimizer adam-8bit needs bitsandbytes: pip install 'sarm[bnb]'"
            ) from error
        return bitsandbytes.optim.Adam8bit(parameters, betas=BETAS)
    return torch.optim.Adam(parameters, betas=BETAS, fused=True)
