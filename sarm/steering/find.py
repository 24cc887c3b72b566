"""From a domain's latents to a profile, by one of three methods; see docs/steering.md."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sarm.errors import InputError
from sarm.ops import SparseLatents
from sarm.steering.files import features_fingerprint
from sarm.steering.finding import Contrast, contrast
from sarm.steering.gate import fit_gate
from sarm.steering.heads import Heads
from sarm.steering.profile import Change, SteeringProfile
from sarm.steering.solve import bounded_head

if TYPE_CHECKING:
    from sarm.evaluation.profiles import LatentSet
    from sarm.modeling import SarmForSequenceClassification


@dataclass(frozen=True)
class Found:
    """A profile, the scores behind it, what to say about it, and what is wrong with it."""

    profile: SteeringProfile
    contrast: Contrast
    notes: list[str] = field(default_factory=list)
    warning: str | None = None


def domain_profile(
    model: SarmForSequenceClassification,
    target: LatentSet,
    off: Sequence[LatentSet],
    *,
    tune: LatentSet | None = None,
    method: str,
    name: str = "",
    top: int = 10,
    factor: float = 2.0,
    stability: float = 0.8,
    shift: float = 1.0,
    limit: int | None = None,
) -> Found:
    """A profile for a domain.

    Args:
        method: "contrast": the `top` features by contrast that a `stability` share of resamples
            selects, multiplied by `factor`.  "bounded", "gate": see `sarm.steering.solve` and
            `sarm.steering.gate`; `shift` in sd of the rewards, with `limit` features at most.
        tune: gate: another sample of the domain, whose chosen answers are to rise by `shift`.
    Raises:
        InputError: a number that is not finite, no off-target set where the method needs one, no
        feature is stable, or the rewards that `shift` is measured in are all equal;
        see also the method.
    """
    for option, value in (("factor", factor), ("shift", shift)):
        if not math.isfinite(value):
            raise InputError(f"steer find: {option} must be a finite number, got {value}")
    if method != "contrast" and not off:
        raise InputError(f"steer find: method {method} needs an off-target set")
    scores = contrast(target.matrix, target.chosen, target.groups, top=min(top, target.n_latents))
    about: dict[str, Any] = {"name": name, "model": features_fingerprint(model)}
    if method == "contrast":
        chosen = scores.stable(stability)[:top]
        if not len(chosen):
            raise InputError(
                f"steer find: no feature is among the top {top} in {100 * stability:g} % of the "
                "resamples; take more prompts, a larger top or a smaller stability"
            )
        text = f"contrast score, {len(chosen)} features x {factor:g}"
        changes = {int(j): Change(multiply=factor) for j in chosen}
        return Found(SteeringProfile(changes, description=text, **about), scores)
    plain = Heads(model, model.score.weight[:1])
    measured = tune or target
    sd = float(measured.rewards(plain)[:, 0].std())
    if not sd > 0:
        raise InputError(f"steer find: the rewards of {measured.benchmark.name} are all equal")
    wanted = shift * sd
    if method == "bounded":
        features = None
        if limit is not None:
            features = np.sort(np.argsort(-np.abs(scores.score), kind="stable")[:limit])
        added = bounded_head(target, off, wanted, features=features)
        changes = {int(j): Change(add=float(added[j])) for j in np.flatnonzero(added)}
        text = f"bounded head, {shift:g} sd on the finding set"
        return Found(SteeringProfile(changes, description=text, **about), scores)
    rewards = [one.rewards(plain)[:, 0] for one in off]
    fit = fit_gate(target, off, rewards, wanted, tune=tune, features=limit)
    text = f"gate over {len(fit.gate.weights)} features, {shift:g} sd on {measured.benchmark.name}"
    notes = [f"gate: opens for {100 * fit.opens:.1f} % of the chosen answers, out of fold"]
    if tune is not None:
        notes.append(f"{tune.benchmark.name}: for {100 * fit.tuned:.1f} % of the chosen answers")
    for one, seen in zip(off, fit.off, strict=True):
        notes.append(
            f"{one.benchmark.name}: touches {100 * seen.touched:.2f} % of pairs "
            f"(standard error {100 * seen.error:.2f}), changes the order of "
            f"{100 * seen.changes:.2f} %, mean {seen.mean:+.3f} sd, out of fold"
        )
    warning = None if fit.within else "no threshold keeps the off-target sets within bounds"
    return Found(SteeringProfile({}, fit.gate, description=text, **about), scores, notes, warning)


def merged(sets: Sequence[LatentSet]) -> LatentSet:
    """Several sets as one; prompts of different sets stay different."""
    if len(sets) == 1:
        return sets[0]
    items = [
        replace(item, part=f"{s}:{item.part}")
        for s, one in enumerate(sets)
        for item in one.benchmark.items
    ]
    latents = SparseLatents(
        torch.cat([one.latents.vals for one in sets]), torch.cat([one.latents.idx for one in sets])
    )
    name = " and ".join(one.benchmark.name for one in sets)
    benchmark = replace(sets[0].benchmark, name=name, items=items)
    cut = tuple(c for one in sets for c in one.cut)
    return replace(sets[0], benchmark=benchmark, latents=latents, cut=cut)


def write_contrast(scores: Contrast, path: str | Path) -> None:
    """A CSV row for every feature, best score first."""
    from sarm.checkpoint import replace_file

    names = ("score", "low", "high", "rank", "rank_low", "rank_high", "selected")
    with replace_file(path) as file:
        rows = csv.writer(file)
        rows.writerow(["feature", *names])
        for j in np.argsort(-scores.score, kind="stable"):
            rows.writerow([j, *(f"{getattr(scores, name)[j]:.6g}" for name in names)])
