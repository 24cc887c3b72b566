"""Training a SARM's head on preferences: backbone and SAE frozen, states cached, head solved."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarm.checkpoint import replace_files
from sarm.data import BadRecords, PreferencePair
from sarm.errors import InputError
from sarm.evaluation.metrics import Estimate, bootstrap
from sarm.formats.hooks import check_hook
from sarm.modeling import SarmForSequenceClassification
from sarm.sae import SparseAutoencoder
from sarm.states import StateCache
from sarm.tokens import ConversationEncoder
from sarm.training.bradley_terry import margins_of
from sarm.training.head import SPARSE_POOL, HeadFit, fit_head, pair_accuracy, scaled_problem
from sarm.training.head_path import PathPoint, best_point, fit_path, smallest_within
from sarm.training.head_report import plot_path, standard_errors, write_table

PROBE = "probe.safetensors"
REPORT = "training.json"
TABLE = "features.csv"
PLOT = "features.svg"
PENALTIES = {"l2": 0.0, "l1": 1.0, "elastic-net": 0.5}  # share of L1


@dataclass(frozen=True)
class PairStates:
    """(M, d_model) fp32 scored-token states of chosen and rejected answers, and what was cut."""

    chosen: Tensor
    rejected: Tensor
    groups: list[str]
    truncated: int
    kept: list[int]  # which of the pairs these are


@dataclass(frozen=True)
class RewardFit:
    """A fitted SARM and, beside it, the dense probe on the same states."""

    model: SarmForSequenceClassification
    head: HeadFit
    probe: HeadFit
    pairs: int
    equal: int  # pairs whose two sides have the same tokens; they say nothing and are left out
    truncated: int
    differences: sp.csr_matrix
    errors: np.ndarray  # (n_latents,) standard errors of the head's weights, see head_report
    path: list[PathPoint] = field(default_factory=list)  # of an L1 or elastic-net penalty
    held_out: Estimate | None = None  # accuracy, 95 % bootstrap over prompts
    path_held_out: list[float] | None = None

    @property
    def smallest(self) -> PathPoint | None:
        """The fewest features within a point of the path's best accuracy (held out, else CV)."""
        return smallest_within(self.path, 1.0, self.path_held_out) if self.path else None

    @property
    def head_features(self) -> int:
        """How many features the model's head uses."""
        return int(np.count_nonzero(self.head.weight))

    def lines(self) -> list[str]:
        """What a reader wants to know, beside the table of the fits."""
        found = []
        if self.held_out is not None:
            found.append(f"held out: accuracy {self.held_out} % (95 % bootstrap over prompts)")
        if self.smallest is not None:
            worst = max(point.gap for point in self.path)
            found.append(
                f"path: {len(self.path)} heads of {self.path[0].features} to "
                f"{self.path[-1].features} features, duality gap at most {worst:.1e}; kept: "
                f"{self.head_features} features; lowest CV loss: "
                f"{best_point(self.path).features}; within 1 point of the best accuracy: "
                f"{self.smallest.features}"
            )
        return found


def pair_states(
    pairs: Sequence[PreferencePair],
    encoder: ConversationEncoder,
    cache: StateCache,
    progress: Callable[[int, int], None] = lambda tokens, of: None,
) -> tuple[PairStates, int]:
    """States of all pairs that differ (from the cache where it has them) and how many do not."""
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    encoded = encoder.encode(sides, lambda i: f"{pairs[i // 2].where} ({_side(i)})")
    differ = [m for m in range(len(pairs)) if encoded[2 * m].ids != encoded[2 * m + 1].ids]
    rows = [encoded[2 * m + side].ids for m in differ for side in (0, 1)]
    if not rows:
        raise InputError("train-rm: no pair whose chosen and rejected differ")
    states = cache.states(rows, progress=progress)
    return (
        PairStates(
            chosen=states[0::2],
            rejected=states[1::2],
            groups=[pairs[m].prompt_key for m in differ],
            truncated=sum(e.dropped > 0 for e in encoded),
            kept=differ,
        ),
        len(pairs) - len(differ),
    )


def usable_pairs(
    pairs: Iterable[PreferencePair], encoder: ConversationEncoder, bad: BadRecords
) -> list[PreferencePair]:
    """The pairs whose two sides the chat template accepts; the others are reported to `bad`."""
    usable = []
    for pair in pairs:
        try:
            for i, side in enumerate((pair.chosen, pair.rejected)):
                encoder.render(side, f"{pair.where} ({_side(i)})")
        except InputError as error:
            bad.report(str(error))
        else:
            usable.append(pair)
    return usable


def _side(i: int) -> str:
    return "rejected" if i % 2 else "chosen"


def sparse_features(sae: SparseAutoencoder, states: Tensor, batch: int = 1024) -> sp.csr_matrix:
    """(N, n_latents) CSR of the active latents of states (N, d_model)."""
    parts, counts = [], [torch.zeros(1, dtype=torch.int64)]
    device = sae.encoder.weight.device
    with torch.inference_mode():
        for chunk in states.split(batch):
            latents = sae.encode(chunk.to(device))
            active = latents.vals != 0  # an SAE with thresholds fills its rows up with zeros
            parts.append([t[active].cpu() for t in latents])
            counts.append(active.sum(1).cpu())
    vals, idx = (torch.cat(columns).numpy() for columns in zip(*parts, strict=True))
    rows = torch.cat(counts).cumsum(0).numpy()
    return sp.csr_matrix((vals, idx, rows), shape=(len(states), sae.n_latents))


def feature_differences(sae: SparseAutoencoder, states: PairStates) -> sp.csr_matrix:
    """(M, n_latents) latents of chosen minus rejected."""
    return sparse_features(sae, states.chosen) - sparse_features(sae, states.rejected)


def dense_differences(sae: SparseAutoencoder, states: PairStates) -> np.ndarray:
    """(M, d_model) normalised states of chosen minus rejected: what a dense probe sees."""
    return (sae.normalize(states.chosen) - sae.normalize(states.rejected)).double().numpy()


def train_reward(
    backbone,
    sae: SparseAutoencoder,
    pairs: Sequence[PreferencePair],
    encoder: ConversationEncoder,
    cache: StateCache,
    *,
    l2: float | None = None,
    penalty: str = "l2",
    smallest: float | None = None,
    margin: bool | None = None,
    centre: float = 0.0,
    valid: Sequence[PreferencePair] | None = None,
    progress: Callable[[int, int], None] = lambda tokens, of: None,
) -> RewardFit:
    """Fit the head (and a dense probe for comparison) on preference pairs.

    Args:
        l2: penalty of the head; None: cross-validated over prompts (see `fit_head`).
        penalty: "l2"; or "l1" or "elastic-net" (half of each): a path, see `fit_path`, of which the
            head with the lowest cross-validated loss becomes the model's.
        smallest: of a path: instead, the head of the fewest features whose cross-validated accuracy
            is at most so many percentage points below the best.
        margin: see `margins_of`.   centre: see `PairLoss`.
        valid: held-out pairs, for an accuracy with its interval.
        progress: tokens run through the backbone, of how many.
    Raises:
        InputError: names the pair that cannot be tokenised; no usable pair.
    """
    if sae.d_model != backbone.config.hidden_size:
        raise InputError(
            f"the SAE has d_model={sae.d_model}, the backbone {backbone.config.hidden_size}"
        )
    check_hook(sae.hook, backbone)
    sae = _in_dtype(sae, backbone.dtype)
    if penalty not in PENALTIES:
        raise InputError(f"penalty must be one of {', '.join(PENALTIES)}, got {penalty!r}")
    if l2 is not None and penalty != "l2":
        raise InputError(f"l2 belongs to penalty l2; the strengths of {penalty} are a path")
    if smallest is not None and (penalty == "l2" or not 0 <= smallest < 100):
        raise InputError(
            "smallest_within takes percentage points, in [0, 100), of a path (penalty l1 or "
            f"elastic-net); got {smallest} with penalty {penalty}"
        )
    states, equal = pair_states(pairs, encoder, cache, progress)
    asked = margins_of(pairs, margin)
    chosen, rejected = (sparse_features(sae, s) for s in (states.chosen, states.rejected))
    differences, groups = chosen - rejected, states.groups
    problem: dict[str, Any] = {
        "pool": SPARSE_POOL,
        "margins": [asked[i] for i in states.kept] if asked else None,
        "sums": chosen + rejected if centre else None,
        "centre": centre,
    }
    path: list[PathPoint] = []
    if penalty == "l2":
        head = fit_head(differences, l2=l2, groups=groups, **problem)
    else:
        started = time.perf_counter()
        path = fit_path(differences, groups=groups, ratio=PENALTIES[penalty], **problem)
        point = best_point(path) if smallest is None else smallest_within(path, smallest)
        head = _as_fit(point, sae.n_latents, path, time.perf_counter() - started)
    scaled, scale = scaled_problem(differences, **problem)
    errors = standard_errors(scaled, head.weight * scale, head.l2, groups) / scale
    probe = fit_head(dense_differences(sae, states), groups=groups)
    held_out, of_path = None, None
    if valid is not None:
        unseen = pair_states(valid, encoder, cache, progress)[0]
        unseen_differences = feature_differences(sae, unseen)
        wins = unseen_differences @ head.weight
        held_out = bootstrap((wins > 0) + 0.5 * (wins == 0), unseen.groups)
        of_path = [pair_accuracy(unseen_differences @ p.dense(sae.n_latents)) for p in path]
    weight = torch.from_numpy(head.weight).float()[None]
    model = SarmForSequenceClassification.from_parts(backbone, sae.to(backbone.device), weight)
    return RewardFit(
        model,
        head,
        probe,
        len(groups),
        equal,
        states.truncated,
        differences,
        errors,
        path,
        held_out,
        of_path or None,
    )


def _as_fit(
    point: PathPoint, n_features: int, path: Sequence[PathPoint], seconds: float
) -> HeadFit:
    return HeadFit(
        weight=point.dense(n_features),
        l2=point.l2,
        loss=point.loss,
        accuracy=point.accuracy,
        gradient_norm=point.subgradient,
        iterations=len(path),
        seconds=seconds,
        cv={point.l2: point.cv_loss},
    )


def _in_dtype(sae: SparseAutoencoder, dtype: torch.dtype) -> SparseAutoencoder:
    """The SAE as a saved SARM holds it: weights in the backbone's dtype, biases fp32.

    The head must be fitted on exactly the features that scoring will see.
    """
    if sae.encoder.weight.dtype == dtype:
        return sae
    sae = copy.deepcopy(sae)
    sae.encoder.to(dtype)
    sae.decoder.to(dtype)
    return sae


def save_reward(fit: RewardFit, tokenizer, out: str | Path, extra: dict | None = None) -> None:
    """Write the SARM, tokenizer, dense probe, `training.json` and `features.csv`, all or none.

    Of a path also `features.svg`, accuracy over the number of features.
    """
    out = Path(out)
    with replace_files(out) as staging:
        tokenizer.save_pretrained(staging)
        save_file({"weight": torch.from_numpy(fit.probe.weight).float()}, staging / PROBE)
        report = {
            "pairs": fit.pairs,
            "equal_pairs": fit.equal,
            "truncated_conversations": fit.truncated,
            "head": _summary(fit.head),
            "probe": _summary(fit.probe),
            "held_out_accuracy": fit.held_out and asdict(fit.held_out),
            "path": [_point(point) for point in fit.path],
            "path_held_out_accuracy": fit.path_held_out,
            "features_within_1_point": fit.smallest and fit.smallest.features,
            **(extra or {}),
        }
        write_table(staging / TABLE, fit.differences, fit.head.weight, fit.errors, None)
        if fit.path:
            plot_path(staging / PLOT, fit.path, fit.path_held_out, None)
        (staging / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        fit.model.save_pretrained(staging)


def _summary(fit: HeadFit) -> dict:
    fields = asdict(fit)
    weight = fields.pop("weight")
    return {**fields, "nonzero_weights": int(np.count_nonzero(weight))}


def _point(point: PathPoint) -> dict:
    fields = asdict(point)
    del fields["idx"], fields["weight"]
    return {"features": point.features, **fields}


def load_probe(model_dir: str | Path) -> Tensor:
    """(d_model,) weight of the dense probe that `save_reward` wrote."""
    path = Path(model_dir) / PROBE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no dense probe; train-rm writes one")
    return load_file(path)["weight"]
