"""The other ways to compute the same: the published formula and the installed eai-sparsify.

x (N, d_model)    w_enc, w_dec (n_latents, d_model)    all tensors of one dtype
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from typing import Any

import torch
from suite import Missing
from torch import Tensor
from torch.nn.functional import linear


def published_encode(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The published encoder: all pre-activations, then torch.topk."""
    vals, idx = linear(x, w_enc, b_enc).topk(k, dim=1)
    return vals, idx


def scatter_dense(vals: Tensor, idx: Tensor, n_latents: int) -> Tensor:
    """(N, n_latents): the published z."""
    return vals.new_zeros(vals.shape[0], n_latents).scatter_(1, idx, vals)


def published_loss(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, pre_bias: Tensor, k: int
) -> Tensor:
    """The SAE's loss by dense tensors: encode, TopK, dense z, decode, normalised MSE."""
    return normalized_mse(published_dense(x, w_enc, b_enc, w_dec, pre_bias, k), x)


def published_dense(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, pre_bias: Tensor, k: int
) -> Tensor:
    """(N, d_model): the published reconstruction, by a dense z."""
    pre = linear(x - pre_bias, w_enc, b_enc)
    vals, idx = pre.topk(k, dim=1)
    z = torch.zeros_like(pre).scatter(1, idx, vals)
    return z @ w_dec + pre_bias


def published_value(x: Tensor, w_enc: Tensor, b_enc: Tensor, head: Tensor, k: int) -> Tensor:
    """Encoder and reward: z times the head."""
    vals, idx = published_encode(x, w_enc, b_enc, k)
    return scatter_dense(vals, idx, w_enc.shape[0]) @ head.t()


def normalized_mse(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Fraction of variance unexplained, in fp32."""
    x = x.float()
    return (reconstruction.float() - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()


@functools.cache
def sparsify(device: str) -> Any:
    """Module `sparsify`, or Missing. Its Triton decoder cannot run on a CPU, so it is told so."""
    if device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints while it is imported
            import sparsify
            import sparsify.fused_encoder
            import sparsify.utils
    except ModuleNotFoundError as error:
        if error.name == "sparsify":
            return Missing("not installed (pip install sarm[bench])")
        return Missing(f"not importable: {error}")
    return sparsify


def sparsify_encode(module: Any, x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> tuple:
    """Its fused encoder; the k values are not sorted."""
    return module.fused_encoder.fused_encoder(x, w_enc, b_enc, k, "topk")[:2]


def sparsify_loss(
    module: Any,
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    w_dec: Tensor,
    pre_bias: Tensor,
    k: int,
) -> Tensor:
    """What its SparseCoder.forward computes, without AuxK and multi-TopK."""
    acts, idx = sparsify_encode(module, x - pre_bias, w_enc, b_enc, k)
    y = module.utils.decoder_impl(idx, acts.to(w_dec.dtype), w_dec.mT) + pre_bias
    return normalized_mse(y, x)
