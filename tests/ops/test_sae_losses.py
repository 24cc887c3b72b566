"""Gradients of the losses that SAEs and reward heads are trained with, composed of the ops.

Each loss is written twice: of the ops alone, and of dense (N, n_latents) activations for autograd.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sarm import ops

N, D_MODEL, N_LATENTS, K = 18, 40, 150, 6
INF = float("inf")

ON = [
    ("reference", torch.float64),
    ("reference", torch.float32),
    ("reference", torch.bfloat16),
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
]
every_precision = pytest.mark.parametrize(("backend", "dtype"), ON, indirect=["backend"])


class Parameters(NamedTuple):
    w_enc: Tensor  # (n_latents, d_model)
    w_dec: Tensor  # (n_latents, d_model)
    b_enc: Tensor  # (n_latents,) fp32, as b_pre and the states are
    b_pre: Tensor  # (d_model,)
    w_head: Tensor  # (heads, n_latents)

    def leaves(self, dtype=None):
        return Parameters(*[p.detach().to(dtype or p.dtype).requires_grad_() for p in self])


@pytest.fixture
def problem():
    """(states, parameters) with weights of a dtype and the rest in fp32 (fp64 with fp64)."""

    def make(dtype):
        wide = ops.reference.accumulate_dtype(dtype)
        w_enc, w_dec = torch.randn(2, N_LATENTS, D_MODEL).div(D_MODEL**0.5).to(dtype)
        b_enc, b_pre = torch.randn(N_LATENTS).div(10).to(wide), torch.randn(D_MODEL).to(wide)
        w_head = torch.randn(3, N_LATENTS).to(dtype)
        return torch.randn(N, D_MODEL).to(wide), Parameters(w_enc, w_dec, b_enc, b_pre, w_head)

    return make


# ---- of the ops ----------------------------------------------------------------------------


def encode(p, x, k, b_enc=None, relu=False):
    x = (x - p.b_pre).to(p.w_enc.dtype)
    return ops.topk_encode(x, p.w_enc, p.b_enc if b_enc is None else b_enc, k, relu=relu)


def decode(p, vals, idx):
    return ops.gather_sum(vals, idx, p.w_dec).to(vals.dtype)


def encode_dead(p, x, dead, k_aux, relu=False):
    """The k_aux largest dead latents: a living one has a bias of -inf."""
    return encode(p, x, k_aux, p.b_enc.masked_fill(~dead, -INF), relu)


def without_minus_inf(vals):
    """With fewer than k_aux dead latents the rest of a row is -inf, and -inf * 0 is NaN."""
    return vals.masked_fill(vals == -INF, 0.0)


# ---- dense ---------------------------------------------------------------------------------


def dense_pre(p, x):
    return (x - p.b_pre).to(p.w_enc.dtype) @ p.w_enc.t() + p.b_enc.to(p.w_enc.dtype)


def dense_topk(pre, k, idx=None):
    """All but the k largest set to zero. Rounded products may order near ties otherwise."""
    idx = pre.topk(k, dim=1).indices if idx is None else idx
    return torch.zeros_like(pre).scatter(1, idx, pre.gather(1, idx))


def dense_decode(p, z, like):
    return (z @ p.w_dec).to(like.dtype)


# ---- comparing -----------------------------------------------------------------------------


def normalized_mse(reconstruction, x):
    return ((reconstruction - x).square().sum(1) / x.square().sum(1)).mean()


def gradients(loss, leaves):
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)
    ]


@pytest.fixture
def compare(check_error):
    """compare(problem, fused, dense): `fused(p, x)` returns (loss, the idx that `dense` takes).

    In fp64 the dense loss selects by itself; where products are rounded it is told the indices.
    """

    def run(x, parameters, fused, dense):
        mine = parameters.leaves()
        loss, idx = fused(mine, x)
        ours = gradients(loss, mine)
        if x.dtype == torch.float64:
            leaves = parameters.leaves()
            expected = dense(leaves, x, [None] * len(idx))
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
            for got, exact in zip(ours, gradients(expected, leaves), strict=True):
                torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-13)
            return
        same, wide = parameters.leaves(), parameters.leaves(torch.float64)
        torchs = gradients(dense(same, x, idx), same)
        exact = gradients(dense(wide, x.double(), idx), wide)
        for got, theirs, truth, leaf in zip(ours, torchs, exact, parameters, strict=True):
            assert got.dtype == leaf.dtype
            check_error(got, theirs, truth)

    return run


# ---- the losses ----------------------------------------------------------------------------


@every_precision
def test_topk_sae(backend, dtype, problem, compare):
    def fused(p, x):
        vals, idx = encode(p, x, K)
        return normalized_mse(decode(p, vals, idx) + p.b_pre, x), [idx]

    def dense(p, x, idx):
        z = dense_topk(dense_pre(p, x), K, idx[0])
        return normalized_mse(dense_decode(p, z, x) + p.b_pre, x)

    compare(*problem(dtype), fused, dense)


K_AUX = 12


def dead_latents(n_dead):
    dead = torch.zeros(N_LATENTS, dtype=torch.bool)
    dead[torch.randperm(N_LATENTS)[:n_dead]] = True
    return dead


@pytest.mark.parametrize("n_dead", [70, K_AUX, 5, 0])
@every_precision
def test_auxk(backend, dtype, n_dead, problem, compare):
    """arXiv 2406.04093, A.2: dead latents learn to explain what the living ones leave."""
    x, parameters = problem(dtype)
    dead = dead_latents(n_dead)
    residual = torch.randn_like(x)  # detached, hence any constant

    def fused(p, x):
        vals, idx = encode(p, x, K)
        aux_vals, aux_idx = encode_dead(p, x, dead, K_AUX)
        aux = decode(p, without_minus_inf(aux_vals), aux_idx)
        loss = normalized_mse(decode(p, vals, idx) + p.b_pre, x)
        return loss + normalized_mse(aux, residual.to(x)) / 32, [idx, aux_idx[:, :n_dead]]

    def dense(p, x, idx):
        pre = dense_pre(p, x)
        z = dense_topk(pre, K, idx[0])
        # among the dead columns only: no -inf anywhere
        chosen = min(K_AUX, n_dead)
        columns = dead.nonzero().squeeze(1)
        among = None if idx[1] is None else torch.searchsorted(columns, idx[1].contiguous())
        z_aux = torch.zeros_like(pre)
        z_aux[:, columns] = dense_topk(pre[:, columns], chosen, among)
        loss = normalized_mse(dense_decode(p, z, x) + p.b_pre, x)
        return loss + normalized_mse(dense_decode(p, z_aux, x), residual.to(x)) / 32

    compare(x, parameters, fused, dense)


@pytest.mark.parametrize("n_dead", [70, 5])
@pytest.mark.parametrize("relu", [False, True])
def test_auxk_reaches_the_dead_and_nothing_alive(backend, n_dead, relu, problem):
    x, parameters = problem(torch.float32)
    p, dead = parameters.leaves(), dead_latents(n_dead)
    with torch.no_grad():
        residual = x - decode(p, *encode(p, x, K)) - p.b_pre
    vals, idx = encode_dead(p, x, dead, K_AUX, relu)
    assert dead[idx[:, : min(n_dead, K_AUX)]].all()
    # relu=True clamps -inf to 0 by itself, and blocks its gradient
    vals = vals if relu else without_minus_inf(vals)
    used = torch.zeros_like(dead)
    used[idx[vals != 0]] = True
    normalized_mse(decode(p, vals, idx), residual).backward()
    assert used.any()
    assert not (used & ~dead).any()
    for gradient in (p.w_enc.grad, p.w_dec.grad, p.b_enc.grad[:, None]):
        assert torch.equal(gradient.any(dim=1), used)


def test_minus_inf_must_not_reach_the_decoder(backend, problem):
    x, parameters = problem(torch.float32)
    p, dead = parameters.leaves(), dead_latents(5)
    vals, idx = encode_dead(p, x, dead, K_AUX)
    assert ((vals == -INF).sum(dim=1) == K_AUX - 5).all()
    assert not decode(p, vals, idx).isfinite().any()
    # nor do weights of zero help
    assert ops.gather_sum(vals, idx, torch.zeros_like(p.w_dec)).isnan().all()
    decode(p, without_minus_inf(vals), idx).sum().backward()
    assert all(p[i].grad.isfinite().all() for i in range(4))


@every_precision
def test_multi_topk(backend, dtype, problem, compare):
    """Losses at k and 4k from one encode: the first k columns are the top k."""

    def fused(p, x):
        vals, idx = encode(p, x, 4 * K)
        few = normalized_mse(decode(p, vals[:, :K], idx[:, :K]) + p.b_pre, x)
        return few + normalized_mse(decode(p, vals, idx) + p.b_pre, x) / 8, [idx[:, :K], idx]

    def dense(p, x, idx):
        pre = dense_pre(p, x)
        few, many = (dense_topk(pre, k, i) for k, i in zip((K, 4 * K), idx, strict=True))
        loss = normalized_mse(dense_decode(p, few, x) + p.b_pre, x)
        return loss + normalized_mse(dense_decode(p, many, x) + p.b_pre, x) / 8

    compare(*problem(dtype), fused, dense)


@every_precision
def test_reward_heads(backend, dtype, problem, compare):
    """Bradley-Terry over (chosen, rejected) pairs of rows, several heads at once."""

    def loss_of(rewards):
        chosen, rejected = rewards[0::2], rewards[1::2]
        return -torch.nn.functional.logsigmoid(chosen - rejected).sum(dim=1).mean()

    def fused(p, x):
        vals, idx = encode(p, x, K)
        return loss_of(ops.sparse_value(vals, idx, p.w_head)), [idx]

    def dense(p, x, idx):
        return loss_of((dense_topk(dense_pre(p, x), K, idx[0]) @ p.w_head.t()).to(x.dtype))

    compare(*problem(dtype), fused, dense)
