"""A linear whose activations have 16 bits: 8, and 8 more for what those left.

A row is x = s q + left with q int8; `left` is quantised the same way, both halves are rows of one
integer product, and the two results are added. The scored token is one of hundreds, and its own
activations make half of the noise in its state (SmolLM2 cut at 15, constant part taken off: 0.0167
of the normalised state, with this 0.0110; bf16 0.010), so it pays to run such rows a second time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

from sarm import ops


def fine_linear(linear: Callable[[ops.QuantizedRows], Tensor], x: Tensor) -> Tensor:
    """The (n, out) fp32 product of rows x (n, in) fp32 in 16 bits; `linear` adds no bias."""
    first = ops.quantize_rows(x)
    rest = ops.quantize_rows(x - first.q * first.scale[:, None])
    both = ops.QuantizedRows(torch.cat([first.q, rest.q]), torch.cat([first.scale, rest.scale]))
    high, low = linear(both).chunk(2)
    return high + low


def silu_by_rows(x: Tensor) -> Tensor:
    """SiLU of (n, width); a row's bits do not depend on the others.

    On a CPU a vectorised exponential and that of a loop's rest differ in the last bit, and what is
    rest depends on the number of elements: rows go one by one.
    """
    if x.device.type != "cpu":
        return silu(x)
    return torch.stack([silu(row) for row in x]) if len(x) else x
