"""16 bits for the activations of a few rows: what 8 bits left of them, in 8 bits more.

A row is x = s q + left with q int8; `left` is quantised the same way, and the linear's two integer
sums are added. That costs one small product for the rows in question and nothing for the others.
The scored token is one of hundreds, and its own activations make half of the noise in its state
(SmolLM2 cut at 15, constant part taken off: 0.0167 of the normalised state, with this 0.0110; bf16
0.012).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import silu

from sarm import ops


def add_remainder(
    out: Tensor,
    linear: Callable[..., Tensor],
    exact: Tensor,
    rows: ops.QuantizedRows,
    fine: Tensor,
    columns: slice = slice(None),
) -> None:
    """out[fine] += linear(exact - rows[fine]), in place and without the bias.

    Args:
        out: (T, outputs), the linear of the 8-bit rows.
        linear: an Int8Linear.   columns: those of its outputs that `out` has.
        exact: (n, in) fp32, the fine rows before they were quantised.
        rows: (T, in) in 8 bits.   fine: (n,) int64, ascending.
    """
    left = exact - rows.q[fine] * rows.scale[fine, None]
    out[fine] = linear(
        ops.quantize_rows(left), out[fine].float(), out.dtype, columns, with_bias=False
    )


def silu_by_rows(x: Tensor) -> Tensor:
    """SiLU of (n, width); a row's bits do not depend on the others.

    On a CPU a vectorised exponential and that of a loop's rest differ in the last bit, and what is
    rest depends on the number of elements: rows go one by one.
    """
    if x.device.type != "cpu":
        return silu(x)
    return torch.stack([silu(row) for row in x]) if len(x) else x
