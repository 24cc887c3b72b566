"""opcheck, torch.compile and autocast: the ops behave inside PyTorch's machinery."""

import pytest
import torch

from sarm import ops


def samples(dtype):
    """op name -> (arguments, positions that require grad)"""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    idx = torch.tensor([[0, 3, 8, 3], [1, 2, 3, 4], [8, 7, 0, 1]])

    def int8(*shape):
        return torch.randint(-127, 128, shape, dtype=torch.int8)

    def leaf(*shape, dtype=dtype):
        return torch.randn(*shape).to(dtype).requires_grad_()

    return {
        "topk_encode": (leaf(3, 5), leaf(9, 5), leaf(9, dtype=wide), 4, False),
        "sparse_value": (leaf(3, 4, dtype=wide), idx, leaf(2, 9)),
        "gather_sum": (leaf(3, 4, dtype=wide), idx, leaf(9, 5)),
        "gather_dot": (leaf(3, 5), idx, leaf(9, 5)),
        "scatter_outer": (leaf(3, 4, dtype=wide), idx, leaf(3, 5), 9),
        "quantize_rows": (torch.randn(3, 5).to(dtype),),
        "rmsnorm_quantize": (torch.randn(3, 5).to(dtype), torch.rand(5), 1e-5),
        "silu_mul_quantize": (torch.randn(3, 16).to(dtype), 4),
        "int8_linear": (int8(3, 5), torch.rand(3), int8(7, 5), torch.rand(7), torch.randn(7)),
    }


def skip_without_kernel(backend, op):
    if op not in ops.dispatch.BACKENDS[backend].ops:
        assert op in ops.dispatch.INT8_OPS  # the sparse ops exist on every backend
        pytest.skip(f"{backend} has no {op} yet")


@pytest.mark.parametrize("op", ops.dispatch.OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, op, dtype):
    skip_without_kernel(backend, op)
    torch.library.opcheck(getattr(torch.ops.sarm, op).default, samples(dtype)[op])


def step(x, w_enc, b_enc, w_dec, w_head):
    vals, idx = ops.topk_encode(x, w_enc, b_enc, 5)
    reward = ops.sparse_value(vals, idx, w_head)
    decoded = ops.gather_sum(vals, idx, w_dec)
    products = ops.gather_dot(decoded, idx, w_dec)
    outer = ops.scatter_outer(products, idx, x, w_enc.shape[0])
    return reward.sum() + decoded.square().sum() + outer.square().sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (7, 11):
        shapes = [(n, 12), (64, 12), (64,), (64, 12), (2, 64)]
        eager = [torch.randn(shape).requires_grad_() for shape in shapes]
        traced = [t.detach().clone().requires_grad_() for t in eager]
        step(*eager).backward()
        compiled(*traced).backward()
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    inputs = [torch.randn(s) for s in [(7, 12), (64, 12), (64,), (64, 12), (2, 64)]]
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*inputs), step(*inputs))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_x_and_w_enc_only(backend, compiled):
    x, w_enc = (torch.randn(s, 16).requires_grad_() for s in (4, 50))
    b_enc = torch.randn(50).requires_grad_()
    with torch.no_grad():
        expected = ops.topk_encode(x.bfloat16(), w_enc.bfloat16(), b_enc, 3)
        full = ops.topk_encode(x, w_enc, b_enc, 3)

    def run(x, w_enc, b_enc):
        return ops.topk_encode(x, w_enc, b_enc, 3)

    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    with torch.autocast("cpu", torch.bfloat16):
        vals, idx = run(x, w_enc, b_enc)
    assert vals.dtype == torch.float32
    assert torch.equal(vals, expected.vals)
    assert torch.equal(idx, expected.idx)
    assert not torch.equal(vals, full.vals)
    vals.sum().backward()
    assert x.grad.dtype == w_enc.grad.dtype == b_enc.grad.dtype == torch.float32


@pytest.mark.parametrize("op", [op for op in ops.dispatch.OPS if op != "topk_encode"])
def test_autocast_leaves_the_other_ops_alone(backend, op):
    skip_without_kernel(backend, op)
    arguments = samples(torch.float32)[op]
    with torch.autocast("cpu", torch.bfloat16):
        inside = getattr(ops, op)(*arguments)
    outside = getattr(ops, op)(*arguments)
    if isinstance(outside, torch.Tensor):
        inside, outside = (inside,), (outside,)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_named_tuple():
    latents = ops.topk_encode(torch.randn(2, 3), torch.randn(5, 3), torch.zeros(5), 2)
    assert isinstance(latents, ops.SparseLatents)
    assert latents.vals.shape == latents.idx.shape == (2, 2)
