"""Suppressing style features: multipliers fitted on some prompts, judged on others.

With latents cached a profile of multipliers m is a head, and choosing it is convex:

    minimise over m in [low, high]   sum_level a_level mean softplus(-margin(m)) + l2/2 |m - 1|^2

over RM-Bench's pairs. `a` of the hard level (a plainer chosen answer) is what moves along the
trade: the more it weighs, the more style is given up. Ablating the features with the largest style
reward is the other, cruder curve.

The choice sees the fitting prompts alone: the point with the most hard accuracy out of fold whose
losses on easy and normal, and `margin` standard errors more, stay within `max_drop`. One split of a
few hundred prompts says little about other prompts, so `repeated` does all of it, fit, choice and
judgement, on many.

Legend: M pairs, F latents, P profiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize import minimize
from scipy.special import expit

from sarm.audit.style import StyleScores, style_scores, triple_twins
from sarm.errors import InputError
from sarm.evaluation.metrics import Item, standard_error
from sarm.evaluation.profiles import LatentSet, score_profiles
from sarm.steering.profile import Change, SteeringProfile
from sarm.training.head import assign_folds

LEVELS = ("easy", "normal", "hard")
HARD_WEIGHTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.7, 1.0, 2.0)
FOLDS = 5
ABLATED = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Point:
    """One profile of the trade; all but kind, strength and profile {level: share}.

    kind: "ablate" or "multiply".  strength: features ablated, or the weight of the hard level.
    fitted: accuracies on the fitting prompts (multipliers: out of fold), which choose.  error: the
    standard error, over prompts, of their difference from those without any change.  held: on the
    prompts held out from fit and choice.
    """

    kind: str
    strength: float
    profile: SteeringProfile
    fitted: dict[str, float]
    error: dict[str, float]
    held: dict[str, float]


@dataclass(frozen=True)
class Trade:
    """The curve, accuracies without any change, and the chosen point (None: none is allowed)."""

    points: list[Point]
    fitted: dict[str, float]
    held: dict[str, float]
    chosen: Point | None
    fit_prompts: int
    held_prompts: int

    def outcome(self) -> Outcome:
        """What the choice came to."""
        if self.chosen is None:
            return Outcome(None, dict.fromkeys(LEVELS, 0.0))
        gain = {name: self.chosen.held[name] - self.held[name] for name in LEVELS}
        return Outcome(f"{self.chosen.kind} {self.chosen.strength:g}", gain)


@dataclass(frozen=True)
class Outcome:
    """The chosen point, if any, and {level: change of held-out accuracy} that it brings."""

    chosen: str | None
    gain: dict[str, float]


def trade(
    fit: LatentSet,
    held: LatentSet,
    weight: torch.Tensor,
    *,
    features: int = 500,
    low: float = 0.0,
    high: float = 1.0,
    l2: float = 1e-3,
    max_drop: float = 0.01,
    margin: float = 1.0,
) -> Trade:
    """Both curves, and the point with the most hard accuracy whose easy and normal hold.

    Args:
        fit, held: RM-Bench items of different prompts.  weight: (1, F) the head.
        features: how many may change: the largest style rewards among those with a clear effect.
        low, high: bounds of a multiplier; 0 and 1 only suppress.
        max_drop: how much easy and normal may each lose, out of fold and with `margin` standard
            errors on top, for a point to be chosen.
    Raises:
        InputError: bounds that leave 1 out, prompts of a kind on one side only, or no feature with
        a clear effect.
    """
    if not low <= 1 <= high:
        raise InputError(f"debias: multipliers must include 1, got [{low}, {high}]")
    kinds = [{_domain(item) for item in one.benchmark.items} for one in (fit, held)]
    if kinds[0] != kinds[1]:
        alone = min(kinds[0] ^ kinds[1])
        raise InputError(f"debias: too few prompts of {alone!r} to fit on some and judge on others")
    head = weight[0].double().cpu().numpy()
    chosen, earns = style_features([style_scores(fit, t, head) for t in triple_twins(fit)])
    if not len(chosen):
        raise InputError("debias: no feature's style effect is clear of 0")
    chosen = chosen[:features]
    pairs = _Pairs.of(fit, head, chosen)
    points = []
    ablating = chosen[np.argsort(-earns[chosen], kind="stable")]
    for count in (n for n in ABLATED if n <= len(ablating)):
        m = np.where(np.isin(chosen, ablating[:count]), 0.0, 1.0)
        points.append(("ablate", float(count), m, pairs.margins(m)))
    for hard in HARD_WEIGHTS:
        points.append(("multiply", hard, *pairs.multipliers(hard, low, high, l2)))
    counts = [int(_prompts(one).max()) + 1 for one in (fit, held)]
    of = f"fitted and chosen on {counts[0]:,} prompts of {fit.benchmark.name}"
    profiles = [_profile(kind, strength, chosen, m, of) for kind, strength, m, _ in points]
    heads = torch.cat([weight, *(profile.head(weight) for profile in profiles)])
    found = score_profiles(held.benchmark, held.latents, heads).accuracies
    unseen = [{name: float(found[name][p]) for name in LEVELS} for p in range(len(heads))]
    before = pairs.base > 0
    curve = []
    for (kind, strength, _, margins), profile, after in zip(
        points, profiles, unseen[1:], strict=True
    ):
        fitted, error = pairs.by_level(margins > 0), pairs.errors(margins > 0, before)
        curve.append(Point(kind, strength, profile, fitted, error, after))
    start = pairs.by_level(before)
    return Trade(curve, start, unseen[0], choose(curve, start, max_drop, margin), *counts)


def choose(
    points: Sequence[Point], start: dict[str, float], max_drop: float, margin: float
) -> Point | None:
    """The point with the most hard accuracy of those that keep easy and normal; by `fitted` alone.

    Returns:
        None where no such point gains on hard.
    """

    def keeps(point: Point, name: str) -> bool:
        return start[name] - point.fitted[name] + margin * point.error[name] <= max_drop

    allowed = [p for p in points if keeps(p, "easy") and keeps(p, "normal")]
    best = max(allowed, key=lambda p: p.fitted["hard"], default=None)
    return best if best is not None and best.fitted["hard"] > start["hard"] else None


def repeated(
    one: LatentSet, weight: torch.Tensor, splits: int, *, seed: int = 0, **options
) -> list[Outcome]:
    """`trade` on random halves of the prompts, anew for every split; `options` as there."""
    draw = np.random.default_rng(seed)
    return [trade(*halves(one, draw), weight, **options).outcome() for _ in range(splits)]


@dataclass(frozen=True)
class Spread:
    """Changes of held-out accuracy over splits: {level: ...}, as shares.

    each: share of splits in which easy and normal each lose at most `max_drop`.  together: in which
    they do on average.  unchanged: number of splits in which no point was chosen.
    """

    splits: int
    mean: dict[str, float]
    sd: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    each: float
    together: float
    unchanged: int

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], max_drop: float) -> Spread:
        """Of one split or more."""
        gains = np.array([[one.gain[name] for name in LEVELS] for one in outcomes])
        most = max_drop + 1e-12  # 57 of 58 prompts is a point less than all, up to rounding

        def by_level(numbers: np.ndarray) -> dict[str, float]:
            return dict(zip(LEVELS, numbers.tolist(), strict=True))

        return cls(
            len(outcomes),
            by_level(gains.mean(0)),
            by_level(gains.std(0)),
            by_level(gains.min(0)),
            by_level(gains.max(0)),
            float((gains[:, :2] >= -most).all(1).mean()),
            float((gains[:, :2].mean(1) >= -most).mean()),
            sum(one.chosen is None for one in outcomes),
        )


def halves(one: LatentSet, draw: np.random.Generator) -> tuple[LatentSet, LatentSet]:
    """Two random halves of a set's prompts, within each of its parts; they share no prompt."""
    parts: dict[str, list[str]] = {}
    first = {item.group: item.part for item in reversed(one.benchmark.items)}
    for group, part in sorted(first.items()):
        parts.setdefault(part, []).append(group)
    mine: set[str] = set()
    for groups in parts.values():
        order = draw.permutation(len(groups))
        mine |= {groups[i] for i in order[: len(groups) // 2]}
    side = np.array([item.group in mine for item in one.benchmark.items])
    return one.part(side), one.part(~side)


def style_features(styles: Sequence[StyleScores]) -> tuple[np.ndarray, np.ndarray]:
    """Features with a clear effect in any style, largest first, and (F,) largest reward parts."""
    clear = np.any([score.clear for score in styles], axis=0)
    size = np.max([np.abs(score.reward) for score in styles], axis=0) * clear
    order = np.argsort(-size, kind="stable")
    return order[size[order] > 0], np.max([score.reward for score in styles], axis=0)


def _profile(
    kind: str, strength: float, features: np.ndarray, m: np.ndarray, of: str
) -> SteeringProfile:
    changes = {
        int(j): Change(multiply=float(x)) for j, x in zip(features, m, strict=True) if x != 1.0
    }
    text = f"ablate {strength:g}" if kind == "ablate" else f"multipliers, hard x {strength:g}"
    return SteeringProfile(changes, description=f"debias: {text}; {of}")


def _domain(item: Item) -> str:
    """RM-Bench pools safety-refuse and safety-response."""
    return item.part.split("-")[0]


def _prompts(one: LatentSet) -> np.ndarray:
    """(I,) number of each item's prompt, whatever its part."""
    return np.unique([item.group for item in one.benchmark.items], return_inverse=True)[1]


def pair_levels(one: LatentSet) -> np.ndarray:
    """(M,) 0 easy, 1 normal, 2 hard, for `LatentSet.pairs` of RM-Bench items."""
    i, j = np.divmod(np.arange(len(one.pairs)) % 9, 3)
    return 1 + np.sign(j - i)


@dataclass(frozen=True)
class _Pairs:
    """The fitting pairs: margins are base + parts @ (m - 1).

    base: (M,).  parts: (M, n) what each feature adds at m = 1.  cell: (M,) domain and level.
    prompt: (M,) its number.
    """

    base: np.ndarray
    parts: sp.csr_matrix
    cell: np.ndarray
    prompt: np.ndarray

    @classmethod
    def of(cls, one: LatentSet, head: np.ndarray, features: np.ndarray) -> _Pairs:
        difference = (one.matrix[one.pairs[:, 0]] - one.matrix[one.pairs[:, 1]]).tocsr()
        domains = [_domain(item) for item in one.benchmark.items]
        domain = np.unique(domains, return_inverse=True)[1][one.pairs[:, 2]]
        return cls(
            difference @ head,
            (difference[:, features] @ sp.diags(head[features])).tocsr(),
            3 * domain + pair_levels(one),
            _prompts(one)[one.pairs[:, 2]],
        )

    def margins(self, m: np.ndarray) -> np.ndarray:
        """(M,) of multipliers (n,)."""
        return self.base + self.parts @ (m - 1)

    def by_level(self, right: np.ndarray) -> dict[str, float]:
        """Accuracies: the mean over domains."""
        means = np.bincount(self.cell, right) / np.bincount(self.cell)
        return dict(zip(LEVELS, means.reshape(-1, 3).mean(0).tolist(), strict=True))

    def errors(self, after: np.ndarray, before: np.ndarray) -> dict[str, float]:
        """Standard errors of by_level(after) - by_level(before), prompts being what is sampled."""
        moved = after.astype(float) - before
        cells = [self.cell == cell for cell in range(self.cell.max() + 1)]
        each = np.reshape([standard_error(moved[of], self.prompt[of]) for of in cells], (-1, 3))
        errors = np.sqrt((each**2).sum(0)) / len(each)
        return dict(zip(LEVELS, errors.tolist(), strict=True))

    def multipliers(
        self, hard: float, low: float, high: float, l2: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """(n,) multipliers fitted on all pairs, and (M,) margins out of fold."""
        share = np.array([1.0, 1.0, hard])[self.cell % 3] / np.bincount(self.cell)[self.cell]
        margins = np.empty(len(self.base))
        fold_of = assign_folds(self.prompt.tolist(), FOLDS)
        for fold in np.unique(fold_of):
            mine = fold_of == fold
            change = self._solve(~mine, share, low, high, l2)
            margins[mine] = self.base[mine] + self.parts[mine] @ change
        return 1 + self._solve(np.ones(len(margins), bool), share, low, high, l2), margins

    def _solve(
        self, rows: np.ndarray, share: np.ndarray, low: float, high: float, l2: float
    ) -> np.ndarray:
        """(n,) m - 1 that the pairs in `rows` ask for."""
        a = share[rows] / share[rows].sum()
        x, offset = self.parts[rows], self.base[rows]

        def loss(change: np.ndarray) -> tuple[float, np.ndarray]:
            margin = offset + x @ change
            value = (a * np.logaddexp(0, -margin)).sum() + 0.5 * l2 * change @ change
            return value, x.T @ (-a * expit(-margin)) + l2 * change

        bounds = [(low - 1, high - 1)] * x.shape[1]
        start, options = np.zeros(x.shape[1]), {"maxiter": 200}
        return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
