"""bf16 as hardware computes it, on a machine that has no such instructions: rounded fp32.

Weights, the inputs and outputs of linears, norms and activations, and the residual stream are
rounded to bf16; sums are fp32, as in a tensor core or an AMX tile. PyTorch's own emulation gives
the same kind of result 20 times slower.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def rounded(backbone: Any) -> Any:
    """A copy of a decoder in fp32 whose numbers are bf16's."""
    backbone = copy.deepcopy(backbone)
    for parameter in backbone.parameters():
        parameter.data = to_bf16(parameter.data)
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args: (to_bf16(args[0]),))
            module.register_forward_hook(lambda module, args, out: to_bf16(out))
        elif name.endswith("layernorm"):
            module.register_forward_pre_hook(_round_in_place)  # the stream itself
            module.register_forward_hook(lambda module, args, out: to_bf16(out))
        elif name.endswith("act_fn"):
            module.register_forward_hook(lambda module, args, out: to_bf16(out))
    return backbone


def to_bf16(x: Tensor) -> Tensor:
    """The nearest bf16 numbers, in x.dtype."""
    return x.bfloat16().to(x.dtype)


def _round_in_place(module: nn.Module, args: tuple[Tensor]) -> None:
    args[0].copy_(to_bf16(args[0]))
