"""The TopK sparse autoencoder on the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sarm import ops
from sarm.errors import InputError
from sarm.ops import SparseLatents

EPS = 1e-6  # added to the std, not to the variance, as published


class TopKSAE(nn.Module):
    """h -> x = (h - mean) / (std + 1e-6) -> the k largest of W_enc (x - b_pre) + b_lat.

    Signed: negative pre-activations stay negative when they are among the k largest. Parameter
    names and shapes are the published ones: `pre_bias (d_model,)`, `latent_bias (n_latents,)`,
    `encoder.weight (n_latents, d_model)`, `decoder.weight (d_model, n_latents)`. In memory the
    decoder lies latent by latent (its transpose is contiguous), because it is only ever gathered.
    Biases are fp32 whatever the weights' dtype.

    Args:
        d_model, n_latents, k: sizes, 1 <= k <= n_latents.
        normalization: "token": per-token mean and unbiased std; "none": x = h.
        dtype: of the two weight matrices.
    Raises:
        InputError: k out of range.
    Source: arXiv 2406.04093 (TopK), arXiv 2508.08746 (on the last token, signed).
    """

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        k: int,
        *,
        normalization: str = "token",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not 1 <= k <= n_latents:
            raise InputError(f"TopKSAE: k must be in [1, n_latents={n_latents}], got {k}")
        if normalization not in ("token", "none"):
            raise InputError(
                f'TopKSAE: normalization must be "token" or "none", got {normalization!r}'
            )
        self.d_model, self.n_latents, self.k = d_model, n_latents, k
        self.normalization = normalization
        self.pre_bias = nn.Parameter(torch.zeros(d_model, device=device, dtype=torch.float32))
        self.latent_bias = nn.Parameter(torch.zeros(n_latents, device=device, dtype=torch.float32))
        self.encoder = nn.Linear(d_model, n_latents, bias=False, device=device, dtype=dtype)
        self.decoder = nn.Linear(n_latents, d_model, bias=False, device=device, dtype=dtype)
        by_latent = torch.empty(n_latents, d_model, device=device, dtype=dtype)
        self.decoder.weight = nn.Parameter(by_latent.t())
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Sizes, for `print(sae)`."""
        return f"d_model={self.d_model}, n_latents={self.n_latents}, k={self.k}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random unit decoder rows, the encoder tied to them, zero biases."""
        rows = torch.randn(self.n_latents, self.d_model, device=self.encoder.weight.device)
        rows /= rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.encoder.weight.copy_(rows)
        self.decoder.weight.copy_(rows.t())
        self.pre_bias.zero_()
        self.latent_bias.zero_()

    @torch.no_grad()
    def lay_out_by_latent(self) -> None:
        """Restore the decoder's memory order after a loader has replaced the parameter."""
        if not self.decoder.weight.t().is_contiguous():
            self.decoder.weight.data = self.decoder.weight.data.t().contiguous().t()

    @property
    def w_dec(self) -> Tensor:
        """(n_latents, d_model): the decoder, one row a latent (a view of `decoder.weight`)."""
        return self.decoder.weight.t()

    def normalize(self, h: Tensor) -> Tensor:
        """(N, d_model) fp32: what the SAE sees of raw residual states h (N, d_model)."""
        h = h if h.dtype == torch.float64 else h.float()
        if self.normalization == "none" or h.numel() == 0:
            return h
        return normalize_tokens(h)

    def encode(self, h: Tensor) -> SparseLatents:
        """The k largest latents of raw residual states h (N, d_model), descending."""
        return self.encode_normalized(self.normalize(h))

    def encode_normalized(self, x: Tensor, k: int | None = None) -> SparseLatents:
        """As `encode`, for x (N, d_model) that `normalize` returned; `k` overrides the SAE's."""
        w_enc = self.encoder.weight
        bias = self.latent_bias if w_enc.dtype == torch.float64 else self.latent_bias.float()
        k = self.k if k is None else k
        return ops.topk_encode((x - self.pre_bias).to(w_enc.dtype), w_enc, bias, k)

    def decode(self, latents: SparseLatents) -> Tensor:
        """(N, d_model) fp32 reconstruction, in normalised coordinates, of sparse latents."""
        return ops.gather_sum(latents.vals, latents.idx, self.w_dec).float() + self.pre_bias

    def forward(self, h: Tensor) -> tuple[Tensor, SparseLatents]:
        """(reconstruction of normalize(h), latents) of raw residual states h (N, d_model)."""
        latents = self.encode(h)
        return self.decode(latents), latents

    def preactivations(self, h: Tensor) -> Tensor:
        """(N, n_latents) fp32: every latent before TopK. Dense; for SARMs without TopK."""
        centred = self.normalize(h) - self.pre_bias
        return centred @ self.encoder.weight.float().t() + self.latent_bias


def normalize_tokens(h: Tensor) -> Tensor:
    """(h - mean) / (std + 1e-6) over the last dimension, unbiased std (the published form)."""
    mean = h.mean(dim=-1, keepdim=True)
    std = h.std(dim=-1, keepdim=True)
    return (h - mean) / (std + EPS)
