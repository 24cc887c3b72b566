"""Autocast for the ops: arguments are cast as the op says, and the kernel runs without autocast.

Without a kernel under the autocast keys, PyTorch would call the op with autocast still on, and a
matmul inside a reference would silently run in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("sarm", "FRAGMENT")


def register(op: str, cast: tuple[int, ...] = ()) -> None:
    """Cast the positional arguments `cast` to autocast's dtype; the others stay as given."""
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _LIBRARY.impl(op, _kernel(op, cast, device_type, key), key, with_keyset=True)


def _kernel(op: str, cast: tuple[int, ...], device_type: str, key: str) -> Callable[..., Any]:
    autocast_keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(keyset: Any, *arguments: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        arguments = tuple(
            _to(argument, dtype) if position in cast else argument
            for position, argument in enumerate(arguments)
        )
        with torch._C._ExcludeDispatchKeyGuard(autocast_keys):
            return getattr(torch.ops.sarm, op)(*arguments)

    return kernel


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As PyTorch's own autocast: fp64 and integers are left alone."""
    narrow = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if narrow else tensor
