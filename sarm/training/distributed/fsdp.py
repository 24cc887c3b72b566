"""FSDP2 for reward models, under Accelerate, and checkpoints that any number of processes reads.

Accelerate's plugin says whether and how (`accelerate launch --config_file fsdp2.yaml`). Which
modules are gathered together is ours to say: the packed forward runs the last layer and the SAE
part by part (`sarm.packing.differentiable`), so these, the embedding and the head are one unit,
gathered once a pass, and every other layer is a unit of its own. Weights travel in fp32; autocast
casts them where they are used, as without FSDP, so the loss curve is the same.
"""

from __future__ import annotations

import copy
import os
from typing import Any, TypeVar

import torch
from accelerate import DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sarm.errors import InputError

M = TypeVar("M", bound=nn.Module)


def asked_for() -> bool:
    """Whether the launcher asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def enable_on_cpu(accelerator: Any) -> None:
    """Turn FSDP on where Accelerate does so on GPUs only: torch has it over gloo too."""
    state = accelerator.state
    if asked_for() and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()


def shard(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> None:
    """Spread a `PairModel`'s parameters over all processes, in place.

    Raises:
        InputError: FSDP 1, or an 8-bit backbone.
    """
    if plugin.fsdp_version != 2:
        raise InputError("FSDP 1 is not supported; set fsdp_version: 2")
    sarm: Any = model.sarm
    if not all(p.is_floating_point() for p in model.parameters()):
        raise InputError("FSDP cannot shard an 8-bit backbone; use DDP, or plain weights")
    # FSDP cuts rows of contiguous matrices; the decoder otherwise lies latent by latent
    sarm.sae.decoder.weight.data = sarm.sae.decoder.weight.data.contiguous()
    options: dict[str, Any] = {"offload_policy": plugin.cpu_offload}
    for layer in sarm.model.layers[:-1]:
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(model, **options)


def whole(tensor: Any) -> Any:
    """A sharded tensor put together, on the CPU (collective); anything else as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into a parameter, sharded or not."""
    target.copy_(like(source, target))


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, sharded as `target` is and in its memory order.

    Fused Adam walks weights and moments side by side in memory, and never looks at strides: with
    the decoder's moments in rows and its weights in columns it would train noise.
    """
    if not isinstance(target, DTensor):
        return torch.empty_like(target, dtype=tensor.dtype).copy_(tensor)
    local = tensor.to(target.device_mesh.device_type).contiguous()
    return distribute_tensor(local, target.device_mesh, target.placements)


def whole_optimizer_state(optimizer: Any) -> dict:
    """`optimizer.state_dict()` as one process would have it (collective)."""
    state = optimizer.state_dict()
    kept = {i: {k: whole(v) for k, v in s.items()} for i, s in state["state"].items()}
    return {**state, "state": kept}


def load_optimizer_state(optimizer: Any, state: dict) -> None:
    """What `whole_optimizer_state` returned, into an optimiser of any number of processes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = {
        i: {
            k: like(v, parameters[i])
            if torch.is_tensor(v) and v.shape == parameters[i].shape
            else v
            for k, v in entries.items()
        }
        for i, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": kept})


def skeleton(module: M) -> M:
    """A copy without weights: parameters are on the meta device, buffers are copied."""
    bare: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, bare)


def restored(bare: M, sharded: nn.Module, main: bool) -> M:
    """The skeleton with the sharded module's weights, on the CPU of rank 0 (collective)."""
    state = {}
    for name, tensor in sharded.state_dict().items():
        full = whole(tensor)
        if main:
            state[name] = full.cpu()
    if main:
        bare.load_state_dict(state, assign=True)
    return bare
