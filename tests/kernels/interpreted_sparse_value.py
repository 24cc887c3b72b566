"""Run by test_sparse_value.py in a process of its own with TRITON_INTERPRET=1."""

import pytest
import torch

from sarm import ops


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "k", "n_latents", "heads"),
    [
        (1, 1, 1, 1),
        (5, 3, 7, 2),
        (9, 64, 300, 1),
        (7, 100, 300, 3),
        (3, 300, 300, 5),
        (0, 4, 9, 2),
        (4, 4, 9, 0),
    ],
)
def test_matches_fp64(n, k, n_latents, heads, dtype):
    vals = torch.randn(n, k)
    idx = torch.rand(n, n_latents).argsort(dim=1)[:, :k]
    w_head = torch.randn(heads, n_latents).to(dtype)
    with ops.use_backend("triton"):
        out = ops.sparse_value(vals, idx, w_head)
    products = vals.double() * w_head.double()[:, idx]  # (P, N, k)
    exact, size = products.sum(-1).t(), products.abs().sum(-1).t()
    assert out.shape == (n, heads)
    assert ((out - exact).abs() <= 2e-7 * size + 1e-12).all()


def test_gradients_use_the_other_backends():
    vals, w_head = torch.randn(5, 6, requires_grad=True), torch.randn(2, 30, requires_grad=True)
    idx = torch.randint(30, (5, 6))
    with ops.use_backend(sparse_value="triton"):
        ops.sparse_value(vals, idx, w_head).square().sum().backward()
    ours = vals.grad, w_head.grad
    again = [t.detach().clone().requires_grad_() for t in (vals, w_head)]
    with ops.use_backend("reference"):
        ops.sparse_value(again[0], idx, again[1]).square().sum().backward()
    for a, b in zip(ours, again, strict=True):
        torch.testing.assert_close(a, b.grad)


def test_status():
    assert ops.backend_status()["triton"].available


def test_missing_kernel_is_an_error():
    idx = torch.zeros(1, 1, dtype=torch.int64)
    with (
        ops.use_backend("triton"),
        pytest.raises(ops.BackendUnavailableError, match="has no gather_sum"),
    ):
        ops.gather_sum(torch.zeros(1, 1), idx, torch.zeros(1, 1))
