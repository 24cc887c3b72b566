"""Which checkpoint a feature database belongs to."""

from __future__ import annotations

import torch
from torch import nn

from sarm.modeling import SarmForSequenceClassification
from sarm.states import fingerprint

#: Rows of the encoder that are hashed; any training changes all of them.
ROWS = 64


def identity(model: SarmForSequenceClassification) -> dict[str, str]:
    """Two fingerprints: `features` says what a feature is, `head` what it weighs.

    `features` covers the SAE's encoder side and how it is used (k, layer, activation and
    normalisation). The decoder and the backbone's weights are left out: a scorer may be loaded
    without the one, and the other may be in 8 bits, rotated. So an SAE that was kept while its
    backbone was trained has the features of its origin, and another head. Values are rounded to
    bf16, so that a bf16 checkpoint is the same on a CPU, where it is widened to fp32. A steered
    copy has the features of its original and another head.
    """
    sae, sarm = model.sae, model.config.sarm
    weight = sae.encoder.weight
    parts = nn.Module()
    parts.register_buffer("encoder", _coarse(weight[:: max(1, len(weight) // ROWS)]))
    for name in ("pre_bias", "latent_bias", "threshold"):
        if isinstance(value := getattr(sae, name, None), torch.Tensor):
            parts.register_buffer(name, _coarse(value))
    how = [sae.d_model, sae.n_latents, sarm["k"], sarm["source_layer"], len(sarm["activation"])]
    parts.register_buffer("how", torch.tensor([float(n) for n in how]))
    if sarm["normalization"] != "token" or sarm["activation"] == "none":
        # what the numbers above do not tell apart; left out for the published way, whose
        # fingerprints are in databases and profiles that were made without it
        words = f"{sarm['normalization']} {sarm['activation']}".encode()
        parts.register_buffer("words", torch.tensor(list(words), dtype=torch.uint8))
    head = nn.Module()
    head.register_buffer("weight", model.score.weight.detach()[:1].float())
    return {"features": fingerprint(parts), "head": fingerprint(head)}


def _coarse(t: torch.Tensor) -> torch.Tensor:
    return t.detach().to(torch.bfloat16)
