"""Ops without a gradient: a backward through them is an error that says which op and why."""

from __future__ import annotations

from typing import Any

from torch.library import CustomOpDef


def only(op: CustomOpDef, name: str) -> None:
    """Register a backward for `op` that raises."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{name}: has no gradient: 8-bit ops are for inference")

    op.register_autograd(backward)
