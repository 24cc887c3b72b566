"""The published training loss, written as published: padded batches, a dense SAE on every token.

What `PairModel` is compared with, in tests for equality and in benches for time and memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sarm.modeling import SarmForSequenceClassification
from sarm.training.collate import EncodedPair


def published_loss(
    model: SarmForSequenceClassification,
    pairs: Sequence[EncodedPair],
    mode: int,
    *,
    centre: float = 0.0,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(loss, rewards (B, 2)) of pairs; their `turns` say which tokens are reconstructed.

    Args:
        mode: 0 to 3, see `sarm.training.modes`.   centre, weight: of the centring term and of the
            reconstruction.
    """
    sae, device = model.sae, model.device
    rows = [torch.from_numpy(ids).long() for pair in pairs for ids in pair.ids]
    ids = pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    position = torch.arange(ids.shape[1], device=device)
    mask = position < lengths[:, None]
    with torch.set_grad_enabled(torch.is_grad_enabled() and mode > 0):
        hidden = model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False)[0]
    x, z = _dense_latents(model, hidden)
    of_tokens = (z @ model.score.weight.t())[..., 0]  # a reward for every token; one is kept
    rewards = of_tokens[torch.arange(len(rows), device=device), lengths - 1].view(-1, 2)
    margins = torch.tensor([pair.margin for pair in pairs], device=device)
    loss = -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - margins).mean()
    if centre:
        loss = loss + centre * rewards.sum(1).square().mean()
    if mode >= 2:
        if mode == 3:
            x, z = _dense_latents(model, hidden.detach())
        decoded = z @ sae.decoder.weight.t() + sae.pre_bias
        error = (decoded - x).square().sum(-1) / x.square().sum(-1)
        starts = torch.tensor([start for pair in pairs for start in pair.turns], device=device)
        turns = ((position >= starts[:, None]) & mask).view(len(pairs), -1)
        of_pairs = (error.view(len(pairs), -1) * turns).sum(1) / turns.sum(1)
        loss = loss + weight * of_pairs.mean()
    return loss, rewards


def _dense_latents(model: SarmForSequenceClassification, states: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised states (B, T, d_model) and their latents (B, T, n_latents), all but k zero."""
    sae = model.sae
    x = (states - states.mean(-1, keepdim=True)) / (states.std(-1, keepdim=True) + 1e-6)
    pre = (x - sae.pre_bias) @ sae.encoder.weight.t() + sae.latent_bias
    vals, idx = pre.topk(sae.k, dim=-1)
    return x, torch.zeros_like(pre).scatter(-1, idx, vals)
