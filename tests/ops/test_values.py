"""Every op and backend against an fp64 reference, PyTorch's own error being the yardstick."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sarm import ops

DTYPES = [torch.float32, torch.bfloat16]
# N, k, n_latents, d: around the vector widths (16, 64), ragged, and the edges k=1, k=n_latents
SHAPES = [
    (5, 3, 7, 4),
    (1, 1, 1, 1),
    (33, 7, 50, 65),
    (16, 64, 512, 576),
    (3, 40, 40, 1030),
    (9, 1, 100, 16),
    (0, 3, 7, 4),
    (4, 3, 7, 0),
]
FEW = [HealthCheck.function_scoped_fixture]


def dense(vals, idx, n_latents):
    """(N, n_latents) with repeated indices added up."""
    zeros = torch.zeros(vals.shape[0], n_latents, dtype=vals.dtype)
    return zeros.scatter_add(1, idx, vals)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_sum(backend, shape, dtype, latents, check_error):
    n, k, n_latents, d = shape
    vals, idx = latents(n, k, n_latents)
    w = torch.randn(n_latents, d).to(dtype)
    out = ops.gather_sum(vals, idx, w)
    assert out.dtype == dtype
    torchs = torch.einsum("nk,nkd->nd", vals, w[idx].float()).to(dtype)
    check_error(out, torchs, dense(vals.double(), idx, n_latents) @ w.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gather_dot(backend, shape, dtype, latents, check_error):
    n, k, n_latents, d = shape
    _, idx = latents(n, k, n_latents)
    y, w = torch.randn(n, d).to(dtype), torch.randn(n_latents, d).to(dtype)
    out = ops.gather_dot(y, idx, w)
    assert out.dtype == torch.float32
    torchs = torch.einsum("nd,nkd->nk", y.float(), w[idx].float())
    check_error(out, torchs, (y.double() @ w.double().t()).gather(1, idx))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scatter_outer(backend, shape, dtype, latents, check_error):
    n, k, n_latents, d = shape
    a, idx = latents(n, k, n_latents)
    y = torch.randn(n, d).to(dtype)
    out = ops.scatter_outer(a, idx, y, n_latents)
    assert out.dtype == torch.float32
    torchs = dense(a, idx, n_latents).t() @ y.float()
    check_error(out, torchs, dense(a.double(), idx, n_latents).t() @ y.double())
    # Asked for in y's dtype: the same sums, rounded once.
    assert torch.equal(ops.scatter_outer(a, idx, y, n_latents, dtype), out.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_value(backend, shape, heads, dtype, latents, check_error):
    n, k, n_latents, _ = shape
    vals, idx = latents(n, k, n_latents)
    w_head = torch.randn(heads, n_latents).to(dtype)
    out = ops.sparse_value(vals, idx, w_head)
    assert out.dtype == torch.float32
    torchs = torch.einsum("nk,pnk->np", vals, w_head.float()[:, idx])
    check_error(out, torchs, dense(vals.double(), idx, n_latents) @ w_head.double().t())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_encode(backend, shape, dtype, check_error):
    n, k, n_latents, d = shape
    x, w_enc, b_enc = torch.randn(n, d).to(dtype), torch.randn(n_latents, d).to(dtype), None
    b_enc = torch.randn(n_latents)
    vals, idx = ops.topk_encode(x, w_enc, b_enc, k)
    assert vals.dtype == torch.float32
    assert idx.dtype == torch.int64
    assert (vals[:, :-1] >= vals[:, 1:]).all()
    exact = x.double() @ w_enc.double().t() + b_enc.double()
    pre = torch.addmm(b_enc, x.float(), w_enc.float().t())
    # Values at the returned indices, and the set of values at the border: two GEMMs may order
    # near-equal entries differently, so indices themselves are not compared.
    check_error(vals, pre.gather(1, idx), exact.gather(1, idx))
    check_error(vals, pre.topk(k, dim=1).values, exact.topk(k, dim=1).values)
    assert all(len(set(row.tolist())) == k for row in idx)


@given(
    n=st.integers(0, 6),
    n_latents=st.integers(1, 700),
    d=st.integers(0, 130),
    k=st.integers(1, 700),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=FEW)
def test_any_shape(backend, check_error, n, n_latents, d, k, seed):
    if backend == "triton":  # the interpreter runs a program for every latent, 2 ms each
        n_latents = n_latents // 12 + 1
    k = min(k, n_latents)
    generator = torch.Generator().manual_seed(seed)
    vals = torch.randn(n, k, generator=generator)
    idx = torch.randint(n_latents, (n, k), generator=generator)  # an index may repeat in a row
    y = torch.randn(n, d, generator=generator)
    w = torch.randn(n_latents, d, generator=generator)
    act, wide = dense(vals, idx, n_latents), dense(vals.double(), idx, n_latents)
    y64, w64 = y.double(), w.double()
    check_error(ops.gather_sum(vals, idx, w), act @ w, wide @ w64, wide.abs() @ w64.abs())
    check_error(
        ops.gather_dot(y, idx, w),
        (y @ w.t()).gather(1, idx),
        (y64 @ w64.t()).gather(1, idx),
        y64.abs() @ w64.abs().t(),
    )
    check_error(
        ops.scatter_outer(vals, idx, y, n_latents),
        act.t() @ y,
        wide.t() @ y64,
        wide.abs().t() @ y64.abs(),
    )
    found, _ = ops.topk_encode(y, w, torch.zeros(n_latents), k)
    check_error(
        found, (y @ w.t()).topk(k).values, (y64 @ w64.t()).topk(k).values, y64.abs() @ w64.abs().t()
    )


def test_bf16_results_are_rounded_to_nearest_even(backend):
    w = torch.tensor([[1.0, -1.0, float("nan"), float("inf"), 3e38] * 8]).bfloat16()
    vals = torch.cat([torch.randn(2000), 1 + torch.arange(0, 4096) * 2.0**-12]).unsqueeze(1)
    if backend == "triton":  # a program for every row
        vals = vals[::31]
    out = ops.gather_sum(vals, torch.zeros(len(vals), 1, dtype=torch.int64), w)
    expected = (vals * w.float()).bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


def test_noncontiguous_inputs(backend, latents):
    vals, idx = latents(6, 5, 40)
    w = torch.randn(40, 12)
    x = torch.randn(6, 12)

    def strided(t):  # the same values, every second column of a wider, transposed buffer
        wide = torch.zeros(2 * t.shape[1], t.shape[0], dtype=t.dtype).t()
        wide[:, ::2] = t
        assert not wide[:, ::2].is_contiguous()
        return wide[:, ::2]

    bias = torch.randn(80)[::2]
    pairs = [
        (ops.gather_sum, (vals, idx, w)),
        (ops.gather_dot, (x, idx, w)),
        (ops.sparse_value, (vals, idx, torch.randn(3, 40))),
        (lambda a, i, y: ops.scatter_outer(a, i, y, 40), (vals, idx, x)),
        (lambda x, w: torch.stack([t.double() for t in ops.topk_encode(x, w, bias, 4)]), (x, w)),
    ]
    for op, arguments in pairs:
        assert torch.equal(op(*arguments), op(*map(strided, arguments)))


@pytest.mark.parametrize("op", ["gather_sum", "sparse_value", "gather_dot", "scatter_outer"])
def test_nan_and_inf_stay_where_they_are(backend, op):
    idx = torch.tensor([[0, 1], [2, 3]])
    vals = torch.tensor([[float("nan"), 1.0], [2.0, 3.0]])
    if op == "gather_sum":
        w = torch.ones(4, 20)
        w[3] = float("inf")
        out = ops.gather_sum(vals, idx, w.bfloat16())
    elif op == "sparse_value":
        out = ops.sparse_value(vals, idx, torch.tensor([[1.0, 1.0, 1.0, float("inf")]]))
    elif op == "gather_dot":
        y = torch.stack([torch.full((20,), float("nan")), torch.full((20,), float("inf"))])
        out = ops.gather_dot(y, idx, torch.ones(4, 20))
    else:
        y = torch.stack([torch.ones(20), torch.full((20,), float("inf"))])
        out = ops.scatter_outer(vals, idx, y, 4)
        assert torch.equal(out[1], torch.ones(20))
        out = out[[0, 2]]
    assert out[0].isnan().all()
    assert (out[1] == float("inf")).all()
