"""Every Raises line by its text, on every backend and while tracing (fake tensors)."""

import re

import pytest
import torch

from sarm import ops

N, K, L, D = 3, 2, 8, 4
f32, i64 = torch.float32, torch.int64


def t(*shape, dtype=f32):
    return torch.zeros(shape, dtype=dtype)


IDX = t(N, K, dtype=i64)
CASES = [
    # topk_encode
    ("topk_encode", (t(N), t(L, D), t(L), K), ValueError,
     "topk_encode: x must have 2 dimensions, got shape (3,)"),
    ("topk_encode", (t(N, D, dtype=i64), t(L, D), t(L), K), TypeError,
     "topk_encode: x must be float32 | bfloat16 | float16 | float64, got int64"),
    ("topk_encode", (t(N, 5), t(L, D), t(L), K), ValueError,
     "topk_encode: x and w_enc must have one d_model, got shapes (3, 5) and (8, 4)"),
    ("topk_encode", (t(N, D), t(L, D), t(L, 1), K), ValueError,
     "topk_encode: b_enc must have shape (n_latents=8,), got (8, 1)"),
    ("topk_encode", (t(N, D), t(L, D), t(L), 0), ValueError,
     "topk_encode: k must be in [1, n_latents=8], got 0"),
    ("topk_encode", (t(N, D), t(L, D), t(L), 9), ValueError,
     "topk_encode: k must be in [1, n_latents=8], got 9"),
    ("topk_encode", (t(N, D), t(L, D, dtype=torch.bfloat16), t(L), K), TypeError,
     "topk_encode: w_enc must be float32 (the dtype of x), got bfloat16"),
    ("topk_encode", (t(N, D), t(L, D), t(L, dtype=torch.bfloat16), K), TypeError,
     "topk_encode: b_enc must be float32 (x is summed in it), got bfloat16"),
    ("topk_encode", (t(N, D), t(L, D), t(L).to("meta"), K), ValueError,
     "topk_encode: b_enc must be on x's device cpu, got meta"),
    # sparse_value
    ("sparse_value", (t(N, K), IDX, t(L)), ValueError,
     "sparse_value: w_head must have 2 dimensions, got shape (8,)"),
    ("sparse_value", (t(N, K + 1), IDX, t(1, L)), ValueError,
     "sparse_value: vals and idx must have one shape (N, k), got (3, 3) and (3, 2)"),
    ("sparse_value", (t(N, K), IDX.int(), t(1, L)), TypeError,
     "sparse_value: idx must be int64, got int32"),
    ("sparse_value", (t(N, K), IDX[0], t(1, L)), ValueError,
     "sparse_value: idx must have 2 dimensions, got shape (2,)"),
    ("sparse_value", (t(N, K, dtype=torch.bfloat16), IDX, t(1, L)), TypeError,
     "sparse_value: vals must be float32 (w_head is torch.float32), got bfloat16"),
    ("sparse_value", (t(N, K), IDX, t(1, L).to("meta")), ValueError,
     "sparse_value: w_head must be on vals's device cpu, got meta"),
    # gather_sum
    ("gather_sum", (t(N, K), IDX, t(L)), ValueError,
     "gather_sum: w must have 2 dimensions, got shape (8,)"),
    ("gather_sum", (t(2, K), IDX, t(L, D)), ValueError,
     "gather_sum: vals and idx must have one shape (N, k), got (2, 2) and (3, 2)"),
    ("gather_sum", (t(N, K), IDX, t(L, D, dtype=torch.float64)), TypeError,
     "gather_sum: vals must be float64 (w is torch.float64), got float32"),
    # gather_dot
    ("gather_dot", (t(N, 5), IDX, t(L, D)), ValueError,
     "gather_dot: y and w must have one d_model, got shapes (3, 5) and (8, 4)"),
    ("gather_dot", (t(2, D), IDX, t(L, D)), ValueError,
     "gather_dot: y and idx must have one number of rows, got shapes (2, 4) and (3, 2)"),
    ("gather_dot", (t(N, D), IDX, t(L, D, dtype=torch.bfloat16)), TypeError,
     "gather_dot: y must be bfloat16 (the dtype of w), got float32"),
    # scatter_outer
    ("scatter_outer", (t(N, K), IDX, t(2, D), L), ValueError,
     "scatter_outer: y and idx must have one number of rows, got shapes (2, 4) and (3, 2)"),
    ("scatter_outer", (t(N, K), IDX, t(N, D), 0), ValueError,
     "scatter_outer: n_latents must be >= 1, got 0"),
    ("scatter_outer", (t(N, 1), IDX, t(N, D), L), ValueError,
     "scatter_outer: a and idx must have one shape (N, k), got (3, 1) and (3, 2)"),
    ("scatter_outer", (t(N, K, dtype=torch.float64), IDX, t(N, D), L), TypeError,
     "scatter_outer: a must be float32 (y is torch.float32), got float64"),
    ("scatter_outer", (t(N, K), IDX, t(N, D), L, torch.bfloat16), TypeError,
     "scatter_outer: dtype must be float32, got bfloat16"),
    ("scatter_outer", (t(N, K), IDX, t(N, D, dtype=torch.bfloat16), L, torch.float64), TypeError,
     "scatter_outer: dtype must be float32 | bfloat16, got float64"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "arguments", "error", "text"), CASES)
def test_bad_arguments(backend, op, arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        getattr(ops, op)(*arguments)


@pytest.mark.parametrize("bad", [-1, L, 2**40])
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("sparse_value", lambda idx: (t(N, K), idx, t(1, L))),
        ("gather_sum", lambda idx: (t(N, K), idx, t(L, D))),
        ("gather_dot", lambda idx: (t(N, D), idx, t(L, D))),
        ("scatter_outer", lambda idx: (t(N, K), idx, t(N, D), L)),
    ],
)
def test_index_out_of_range(backend, op, arguments, bad):
    idx = IDX.clone()
    idx[1, 1] = bad
    text = re.escape(f"{op}: idx must be in [0, n_latents=8), got {bad}")
    with pytest.raises(ValueError, match=text):
        getattr(ops, op)(*arguments(idx))
    if backend == "cpu":  # the C++ side does not rely on the caller for memory safety
        private = getattr(torch.ops.sarm_cpu, op)
        more = [False] if op == "scatter_outer" else []
        with pytest.raises(RuntimeError, match=text):
            private(*arguments(idx), *more)


def test_errors_while_tracing():
    with torch._subclasses.FakeTensorMode(), pytest.raises(ValueError, match="k must be in"):
        ops.topk_encode(torch.zeros(N, D), torch.zeros(L, D), torch.zeros(L), 9)
