"""Which features differ between two feature databases: of two data sets, or of two models.

Two data sets on one model, feature by feature: the frequencies' difference with its two-proportion
z (pooled), the means, and the difference of mean contributions, which over all features sums to the
difference of the mean rewards exactly. Responses that share a prompt are not independent, so |z| is
a ranking, and too large as a test.

Two models: a feature's partner is the one whose decoder row has the largest cosine with its own;
`mutual` where each is the other's. What has no partner above a threshold is new, or lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sarm.errors import InputError
from sarm.features.store import Feature, FeatureStore

ORDERS = ("z", "contribution", "mean")
Match = tuple[int, float | None, bool]  # partner, cosine, mutual


@dataclass(frozen=True)
class FeatureDifference:
    """One feature in both: frequencies, mean activations where active, mean contributions.

    z: of the frequencies' difference, second minus first.  partner: in the second model, with the
    cosine of the decoder rows; the same feature and None for one model.  label: the first
    database's, or else that of the partner in the second.
    """

    feature: int
    partner: int
    cosine: float | None
    mutual: bool
    frequency: tuple[float, float]
    mean: tuple[float, float]
    contribution: tuple[float, float]
    z: float
    label: str | None = None

    @property
    def shift(self) -> float:
        """Second minus first mean contribution."""
        return self.contribution[1] - self.contribution[0]


def diff(
    first: FeatureStore,
    second: FeatureStore,
    order: str = "z",
    *,
    decoders: tuple[Tensor, Tensor] | None = None,
) -> list[FeatureDifference]:
    """Every feature that is alive in either database, the largest difference first.

    Args:
        order: "z", "contribution" or "mean", by absolute value.
        decoders: (n_latents, d_model) of either model, where they are two.
    Raises:
        InputError: databases of different models without decoders, or unfinished ones.
    """
    if order not in ORDERS:
        raise InputError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    metas = [first.meta, second.meta]
    for store, meta in zip((first, second), metas, strict=True):
        if meta.get("complete") != "true":
            raise InputError(f"{store.path}: collecting has not been finished")
    sides = [{f.id: f for f in store.features("id", alive=False)} for store in (first, second)]
    n = [int(meta["rows"]) for meta in metas]
    labels, others = first.names(), second.names()
    if decoders is None:
        if metas[0]["features"] != metas[1]["features"]:
            raise InputError(
                f"{first.path} and {second.path} are of different models; give both models to "
                "match their features by decoder"
            )
        pairs: Mapping[int, Match] = {i: (i, None, True) for i in sides[0]}
    else:
        pairs = matched(*decoders)
    found = [
        _difference(sides[0][i], sides[1][j], n, cosine, mutual, labels.get(i) or others.get(j))
        for i, (j, cosine, mutual) in pairs.items()
        if sides[0][i].rows or sides[1][j].rows
    ]
    keys = {"z": lambda d: d.z, "contribution": lambda d: d.shift, "mean": _mean_shift}
    return sorted(found, key=lambda d: (-abs(keys[order](d)), d.feature))


def matched(first: Tensor, second: Tensor) -> Mapping[int, Match]:
    """{feature: (partner, cosine, mutual)}; (n, m) cosines are made a slice at a time."""
    if first.shape[1] != second.shape[1]:
        raise InputError(
            f"decoders of d_model={first.shape[1]} and {second.shape[1]} cannot be matched"
        )
    a, b = (torch.nn.functional.normalize(w.detach().float(), dim=1) for w in (first, second))
    forward, cosine = _nearest(a, b)
    backward, _ = _nearest(b, a)
    back = backward[forward] == torch.arange(len(a))
    rows = zip(forward.tolist(), cosine.tolist(), back.tolist(), strict=True)
    return dict(enumerate(rows))


def _nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    best = [(part @ b.t()).max(dim=1) for part in a.split(4096)]
    return torch.cat([m.indices for m in best]), torch.cat([m.values for m in best])


def _difference(
    a: Feature, b: Feature, n: list[int], cosine: float | None, mutual: bool, label: str | None
) -> FeatureDifference:
    pooled = (a.rows + b.rows) / sum(n)
    spread = math.sqrt(pooled * (1 - pooled) * (1 / n[0] + 1 / n[1]))
    return FeatureDifference(
        feature=a.id,
        partner=b.id,
        cosine=cosine,
        mutual=mutual,
        frequency=(a.frequency, b.frequency),
        mean=(a.mean, b.mean),
        contribution=(a.contribution, b.contribution),
        z=(b.frequency - a.frequency) / spread if spread else 0.0,
        label=label,
    )


def _mean_shift(d: FeatureDifference) -> float:
    return d.mean[1] * d.frequency[1] - d.mean[0] * d.frequency[0]
