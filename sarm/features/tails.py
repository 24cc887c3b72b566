"""The features of every token at the end of a response.

W  tokens of the tail, at most the window    k  active features of a token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sarm.packing import TOKENS_PER_BATCH, check_ids, iter_tail_states
from sarm.packing.budget import Budget, is_out_of_memory
from sarm.sae import SparseAutoencoder
from sarm.scorer import SARMScorer


@dataclass(frozen=True)
class Tail:
    """idx (W, k) int32 and vals (W, k) fp32 of the last W tokens; the scored token is the last."""

    idx: np.ndarray
    vals: np.ndarray

    def of(self, features: np.ndarray, n_features: int) -> np.ndarray:
        """(len(features), W) fp32: for each feature its activation at every token."""
        column = np.full(n_features, -1)
        column[features] = np.arange(len(features))
        found = column[self.idx]
        token, place = np.nonzero(found >= 0)
        dense = np.zeros((len(features), len(self.idx)), np.float32)
        dense[found[token, place], token] = self.vals[token, place]
        return dense


def encoded_tails(scorer: SARMScorer, rows: Sequence[Sequence[int]], window: int) -> list[Tail]:
    """The features of the last `window` tokens of every row; exact, as the scored token's are."""
    backbone, sae = scorer.model.model, scorer.model.sae
    check_ids(rows, backbone.config.vocab_size)
    limit = scorer.max_batch_tokens or TOKENS_PER_BATCH.get(backbone.device.type, 8192)
    tails: list[Tail | None] = [None] * len(rows)
    for done, states in iter_tail_states(backbone, rows, window, limit, budget=Budget()):
        idx, vals = _encode(sae, torch.cat(states))
        at = 0
        for row, part in zip(done, states, strict=True):
            tails[row] = Tail(idx[at : at + len(part)], vals[at : at + len(part)])
            at += len(part)
    return [tail for tail in tails if tail is not None]


@torch.inference_mode()
def _encode(sae: SparseAutoencoder, states: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """idx (N, k) int32 and vals (N, k) fp32; in halves where memory does not suffice."""
    try:
        found = sae.encode(states)
        return found.idx.int().cpu().numpy(), found.vals.float().cpu().numpy()
    except Exception as error:
        if not is_out_of_memory(error) or len(states) < 2:
            raise
    parts = [_encode(sae, half) for half in states.chunk(2)]
    width = max(idx.shape[1] for idx, _ in parts)  # an SAE with thresholds may have widened
    wide = [[np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in part] for part in parts]
    return np.concatenate([w[0] for w in wide]), np.concatenate([w[1] for w in wide])
