"""Gradients: fp64 gradcheck (first and second order), and every backend against dense autograd."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from sarm import ops


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


CASES = {
    "gather_sum": lambda idx: (lambda v, w: ops.gather_sum(v, idx, w), (leaf(3, 4), leaf(9, 5))),
    "gather_dot": lambda idx: (lambda y, w: ops.gather_dot(y, idx, w), (leaf(3, 5), leaf(9, 5))),
    "sparse_value": lambda idx: (
        lambda v, w: ops.sparse_value(v, idx, w),
        (leaf(3, 4), leaf(2, 9)),
    ),
    "scatter_outer": lambda idx: (
        lambda a, y: ops.scatter_outer(a, idx, y, 9),
        (leaf(3, 4), leaf(3, 5)),
    ),
    "topk_encode": lambda idx: (
        lambda x, w, b: ops.topk_encode(x, w, b, 4).vals,
        (leaf(3, 5), leaf(9, 5), leaf(9)),
    ),
    "topk_encode relu": lambda idx: (
        lambda x, w, b: ops.topk_encode(x, w, b, 7, relu=True).vals,
        (leaf(3, 5), leaf(9, 5), leaf(9)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_fp64(case):
    idx = torch.tensor([[0, 3, 8, 3], [1, 2, 3, 4], [8, 7, 0, 1]])  # 3 occurs twice in row 0
    function, inputs = CASES[case](idx)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode_decode_gradients(backend, dtype, check_error):
    """The chain of an SAE: encode, decode, value head; all weights get gradients."""
    n, d, n_latents, k = 17, 33, 120, 8
    x, w_enc, w_dec = (torch.randn(s, d).to(dtype) for s in (n, n_latents, n_latents))
    b_enc, w_head, g = torch.randn(n_latents), torch.randn(2, n_latents), torch.randn(n, d)
    idx = ops.topk_encode(x, w_enc, b_enc, k).idx

    def run(wide, encode, decode, head):
        leaves = [
            (t.double() if wide else t.clone()).requires_grad_()
            for t in (x, w_enc, b_enc, w_dec, w_head)
        ]
        vals = encode(*leaves[:3])
        out = decode(vals, leaves[3])
        loss = (out * g.to(out.dtype)).sum() + head(vals, leaves[4]).square().sum()
        return torch.autograd.grad(loss, leaves)

    def dense_decode(vals, w):
        return torch.einsum("nk,nkd->nd", vals.to(w.dtype), w[idx])

    def dense_head(vals, w):
        return (vals.to(w.dtype)[None] * w[:, idx]).sum(-1).t()

    def plain_encode(x, w, b):
        return (x @ w.t() + b.to(x.dtype)).gather(1, idx)

    ours = run(
        False,
        lambda x, w, b: ops.topk_encode(x, w, b, k).vals,
        lambda v, w: ops.gather_sum(v, idx, w),
        lambda v, w: ops.sparse_value(v, idx, w),
    )
    torchs = run(False, plain_encode, dense_decode, dense_head)
    exact = run(True, plain_encode, dense_decode, dense_head)
    for mine, theirs, truth, like in zip(
        ours, torchs, exact, (x, w_enc, b_enc, w_dec, w_head), strict=True
    ):
        assert mine.dtype == like.dtype
        check_error(mine, theirs, truth)


def test_relu_blocks_the_gradient_of_clamped_values(backend):
    x = torch.tensor([[1.0]], requires_grad=True)
    w_enc = torch.tensor([[2.0], [-3.0]], requires_grad=True)
    ops.topk_encode(x, w_enc, torch.zeros(2), 2, relu=True).vals.sum().backward()
    assert x.grad.tolist() == [[2.0]]
    assert w_enc.grad.tolist() == [[1.0], [0.0]]


def test_only_wanted_gradients_are_computed(backend, monkeypatch):
    x, w_enc, b_enc = torch.randn(4, 6), torch.randn(30, 6), torch.zeros(30, requires_grad=True)
    vals = ops.topk_encode(x, w_enc, b_enc, 3).vals
    called = []
    real = ops.dispatch.select
    monkeypatch.setattr(ops.dispatch, "select", lambda op, *t: called.append(op) or real(op, *t))
    vals.sum().backward()
    assert called == ["scatter_outer"]  # d_b_enc alone
    assert b_enc.grad.sum() == 12


def test_empty_batch_has_zero_gradients(backend):
    w_enc = torch.randn(30, 6, requires_grad=True)
    ops.topk_encode(torch.zeros(0, 6), w_enc, torch.zeros(30), 3).vals.sum().backward()
    assert torch.equal(w_enc.grad, torch.zeros(30, 6))
