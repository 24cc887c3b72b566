"""What tests/ops does not reach in the interpreter: fp16, long segments, slices; its own errors."""

import pytest
import torch
import triton
import triton.language as tl

from sarm import ops
from sarm.kernels import gather_dot, scatter_outer, slices
from sarm.kernels.form import kernel_dtype


@pytest.fixture(autouse=True)
def _triton():
    with ops.use_backend("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "k", "n_latents", "heads"),
    [(1, 1, 1, 1), (9, 64, 300, 1), (7, 100, 300, 3), (3, 300, 300, 5), (0, 4, 9, 2), (4, 4, 9, 0)],
)
def test_sparse_value(n, k, n_latents, heads, dtype):
    vals = torch.randn(n, k)
    idx = torch.rand(n, n_latents).argsort(dim=1)[:, :k]
    w_head = torch.randn(heads, n_latents).to(dtype)
    out = ops.sparse_value(vals, idx, w_head)
    products = vals.double() * w_head.double()[:, idx]  # (P, N, k)
    exact, size = products.sum(-1).t(), products.abs().sum(-1).t()
    assert out.shape == (n, heads)
    assert ((out - exact).abs() <= 2e-7 * size + 1e-12).all()


def test_fp16():
    idx = torch.randint(50, (6, 9))
    vals, y, w = torch.randn(6, 9), torch.randn(6, 70).half(), torch.randn(50, 70).half()
    exact = (vals.double().unsqueeze(2) * w[idx].double()).sum(1)
    torch.testing.assert_close(ops.gather_sum(vals, idx, w).double(), exact, rtol=1e-3, atol=1e-3)
    exact = (y.double().unsqueeze(1) * w[idx].double()).sum(2)
    torch.testing.assert_close(ops.gather_dot(y, idx, w).double(), exact, rtol=1e-5, atol=1e-4)
    with ops.use_backend("reference"):
        exact = ops.scatter_outer(vals.double(), idx, y.double(), 50)
    ours = ops.scatter_outer(vals, idx, y, 50, torch.float16)
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("popular", [0, 1, 3])
@pytest.mark.parametrize("piece", [1, 7, 15, 64])
def test_long_segments_are_summed_in_pieces(monkeypatch, piece, popular):
    n, k, n_latents, d = 16, 5, 7, 70
    monkeypatch.setattr(scatter_outer, "PIECE", piece)
    a, y = torch.randn(n, k), torch.randn(n, d)
    idx = torch.randint(n_latents, (n, k))
    idx[:, :popular] = torch.arange(popular)  # one entry of each token
    ours = ops.scatter_outer(a, idx, y, n_latents)
    exact = torch.zeros(n, n_latents).double().scatter_add(1, idx, a.double()).t() @ y.double()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours, ops.scatter_outer(a, idx, y, n_latents))


def test_every_entry_in_one_latent(monkeypatch):
    monkeypatch.setattr(scatter_outer, "PIECE", 16)
    a, y = torch.randn(50, 4), torch.randn(50, 3)
    ours = ops.scatter_outer(a, torch.full((50, 4), 2), y, 5)
    torch.testing.assert_close(ours[2], a.sum(1) @ y, rtol=1e-4, atol=1e-4)
    assert not ours[[0, 1, 3, 4]].any()


def test_slices_of_gather_dot_do_not_change_a_bit(monkeypatch):
    y, w, idx = torch.randn(12, 300), torch.randn(20, 300), torch.randint(20, (12, 6))
    monkeypatch.setattr(slices, "WIDTHS", (64,))
    whole = ops.gather_dot(y, idx, w)
    monkeypatch.setattr(gather_dot, "L2_BYTES", 0)  # now a launch for every slice of 64
    launches = []
    form = gather_dot.gather_dot_form
    monkeypatch.setattr(gather_dot, "gather_dot_form", lambda w: Recorder(form(w), launches))
    assert torch.equal(whole, ops.gather_dot(y, idx, w))
    assert [arguments[-2:] for arguments in launches] == [
        (begin, min(begin + 64, 300)) for begin in range(0, 300, 64)
    ]


class Recorder:
    """A form that notes its launches."""

    def __init__(self, form, launches):
        self.form, self.launches, self.constants = form, launches, form.constants

    def launch(self, grid, *arguments):
        self.launches.append(arguments)
        self.form.launch(grid, *arguments)


@pytest.mark.parametrize(
    ("rows", "d_model", "itemsize", "width"),
    [
        (65536, 4096, 2, 256),
        (65536, 4096, 4, 128),
        (262144, 4096, 2, 64),
        (18432, 576, 2, 512),
        (10**7, 4096, 4, 64),  # does not fit; a cache line is the least
        (9, 1, 4, 64),
    ],
)
def test_slice_width(rows, d_model, itemsize, width):
    assert slices.slice_width(rows, d_model, itemsize) == width


def test_gradients_use_the_other_backends():
    vals, w_head = torch.randn(5, 6, requires_grad=True), torch.randn(2, 30, requires_grad=True)
    idx = torch.randint(30, (5, 6))
    with ops.use_backend("reference"), ops.use_backend(sparse_value="triton"):
        ops.sparse_value(vals, idx, w_head).square().sum().backward()
    again = [t.detach().clone().requires_grad_() for t in (vals, w_head)]
    with ops.use_backend("reference"):
        ops.sparse_value(again[0], idx, again[1]).square().sum().backward()
    for a, b in zip((vals, w_head), again, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---- the interpreter's own errors: when one of these fails, Triton has fixed it, and the way
# ---- around it (named in the test) can go


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def round_kernel(a_ptr, out_ptr):
    at = tl.arange(0, 16)
    tl.store(out_ptr + at, tl.load(a_ptr + at).to(tl.bfloat16))


def test_interpreted_dot_of_bf16_is_still_wrong():  # encode_tiles_kernel: UPCAST
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.zeros(16, 16)
    dot_kernel[(1,)](a, b, out)
    assert not torch.allclose(out, a.float() @ b.float(), rtol=1e-2, atol=1e-2)
    dot_kernel[(1,)](a.half(), b.half(), out)  # and in fp16 right
    assert torch.allclose(out, a.float() @ b.float(), rtol=1e-2, atol=1e-2)


def test_interpreted_bf16_is_still_not_rounded():  # form.kernel_dtype
    a = 1 + torch.arange(16) * 2.0**-10
    out = torch.zeros(16, dtype=torch.bfloat16)
    round_kernel[(1,)](a, out)
    assert not torch.equal(out, a.bfloat16())
    assert kernel_dtype(torch.bfloat16, a) == torch.float32
