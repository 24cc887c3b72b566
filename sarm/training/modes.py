"""The published training modes: which parameters learn, and from which loss.

    mode   backbone   SAE                     head   (BT: Bradley-Terry; R: reconstruction)
    0      -          -                       BT
    1      BT         -                       BT
    2      BT + R     BT + R                  BT + R = BT
    3      BT         BT + R (input detached) BT

    R = mean over tokens of |decode(encode(h)) - x|^2 / |x|^2,   x the normalised state h

over the tokens of a pair's last assistant turns, or the last token alone ("sequence level"), then
over pairs: published is a pair at a time, and so the loss does not depend on micro-batches. The
SAE's decoder learns from R only. Source: arXiv 2508.08746.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sarm import ops
from sarm.errors import InputError
from sarm.modeling import SarmForSequenceClassification
from sarm.ops import SparseLatents
from sarm.packing.batch import PackedBatch
from sarm.packing.differentiable import wanted_states
from sarm.training.adapters import has_lora
from sarm.training.bradley_terry import bradley_terry

MODES = (0, 1, 2, 3)
RECONSTRUCTION = ("turn", "last")


class PairModel(nn.Module):
    """A SARM and its training loss on a packed batch of pairs.

    Args:
        sarm: a SARM with TopK.
        mode: 0 to 3, see the top; sets `requires_grad` of all parameters.
        reconstruction: weight of R (modes 2 and 3).
        centre: weight of the centring term of the Bradley-Terry loss.
        kept_tokens: see `wanted_states`.
    """

    def __init__(
        self,
        sarm: SarmForSequenceClassification,
        mode: int,
        *,
        reconstruction: float = 1.0,
        centre: float = 0.0,
        kept_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(map(str, MODES))}, got {mode}")
        if sarm.config.sarm["activation"] != "topk":
            raise InputError("training needs a SARM with TopK; this one has none")
        self.sarm, self.mode = sarm, mode
        self.reconstruction, self.centre = reconstruction, centre
        self.kept_tokens = kept_tokens
        if mode > 0 and not has_lora(sarm.model):
            if not all(p.is_floating_point() for p in sarm.model.parameters()):
                raise InputError("an 8-bit backbone cannot learn; give it LoRA, or use mode 0")
            learns = ""
        else:
            learns = "lora_"
        for name, parameter in sarm.model.named_parameters():
            parameter.requires_grad_(mode > 0 and learns in name)
        sarm.sae.requires_grad_(self.reconstructs)
        sarm.score.requires_grad_(True)

    @property
    def reconstructs(self) -> bool:
        """Whether the loss has a reconstruction term."""
        return self.mode >= 2

    def forward(self, margins: Tensor, batch: PackedBatch) -> dict[str, Any]:
        """The loss of B pairs, packed as chosen, rejected, chosen, rejected, ...

        Args:
            margins: (B,) fp32.
            batch: 2 B sequences; wanted are the tokens that are reconstructed, or the last ones.
        Returns:
            loss; rewards (B, 2), chosen first; bradley_terry and reconstruction, the loss's parts
            (detached).
        """
        batch = batch.to(margins.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mode > 0):
            states = wanted_states(self.sarm.model, batch, self.kept_tokens)
        latents, reconstruction = self._latents(states, batch)
        rewards = ops.sparse_value(*latents, self.sarm.score.weight.float())[:, 0].view(-1, 2)
        ranking = bradley_terry(rewards[:, 0], rewards[:, 1], margins, self.centre)
        found = {"loss": ranking, "rewards": rewards, "bradley_terry": ranking.detach()}
        if reconstruction is not None:
            found["loss"] = ranking + self.reconstruction * reconstruction
            found["reconstruction"] = reconstruction.detach()
        return found

    def _latents(self, states: Tensor, batch: PackedBatch) -> tuple[SparseLatents, Tensor | None]:
        """Latents of the scored tokens; the reconstruction loss over all wanted ones."""
        sae = self.sarm.sae
        if not self.reconstructs:
            return sae.encode(states[batch.scored]), None
        x = sae.normalize(states)
        if self.mode == 2:
            latents = sae.encode_normalized(x)
            scored = SparseLatents(latents.vals[batch.scored], latents.idx[batch.scored])
        else:
            scored = sae.encode_normalized(x[batch.scored])
            x = x.detach()
            latents = sae.encode_normalized(x)
        squared = (sae.decode(latents) - x).square().sum(1)
        error = squared / x.square().sum(1).clamp_min(1e-12)
        return scored, (batch.weights * error).sum() / batch.weights.sum()
