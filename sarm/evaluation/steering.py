"""What a profile does: the shift on a target set and off it, rankings, accuracy before and after.

Legend: N conversations, I items, M (chosen, rejected) pairs, P profiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from sarm.errors import InputError
from sarm.evaluation.metrics import Estimate, Result, bootstrap, evaluate
from sarm.evaluation.profiles import LatentSet
from sarm.evaluation.sources import part_of
from sarm.steering import Heads
from sarm.steering.solve import changed_pairs

BEFORE = "before"
CROSSED = "cross-fitted"


@dataclass(frozen=True)
class Shift:
    """One profile on one benchmark, with 95 % bootstrap intervals over prompts.

    sd: of the unsteered rewards of the benchmark's conversations, the unit of the shifts.
    chosen, rejected, all: mean reward after minus before, in sd.  changes: share of chosen/rejected
    pairs whose order changed.  moved: share of conversations whose reward changed.
    """

    benchmark: str
    profile: str
    target: bool
    items: int
    sd: float
    chosen: Estimate
    rejected: Estimate
    all: Estimate
    changes: Estimate
    moved: float


@dataclass(frozen=True)
class SteeringResult:
    """Shifts of every benchmark and profile, accuracies, and the rewards (N, 1 + P) behind them."""

    shifts: list[Shift]
    accuracies: list[Result]
    rewards: dict[str, np.ndarray]

    def to_json(self) -> dict:
        """Everything but the rewards."""
        return {
            "shifts": [asdict(one) for one in self.shifts],
            "accuracies": [asdict(one) for one in self.accuracies],
        }


def evaluate_steering(
    heads: Heads,
    names: Sequence[str],
    target: Sequence[LatentSet],
    off: Sequence[LatentSet],
    *,
    cross: bool = False,
) -> SteeringResult:
    """Judge P profiles on target and off-target sets, each set in one pass over its latents.

    Args:
        heads: 1 + P heads, the first unsteered.  names: of the P profiles.
        cross: judge them as one: an answer by profile i where its prompt is in part i of P
            (`FILE#i/P`), which found without that part has not seen it.
    Raises:
        InputError: no target, profiles of one name, or a set whose rewards are all equal.
    """
    if not target:
        raise InputError("steer eval: the target set is empty; pass what the profile is to move")
    twice = next((name for name in names if list(names).count(name) > 1 or name == BEFORE), None)
    if twice is not None:
        raise InputError(f"steer eval: two profiles are called {twice!r}; give them names")
    shifts, accuracies, rewards = [], [], {}
    parts, names = len(names), [CROSSED] if cross else names
    for one in (*target, *off):
        found = one.rewards(heads)
        if cross:
            by_item = [part_of(item.group, parts) for item in one.benchmark.items]
            own = found[np.arange(len(found)), np.array(by_item)[one.item]]
            found = np.column_stack([found[:, 0], own])
        rewards[one.benchmark.name] = found
        if not np.isfinite(found).all():
            raise InputError(f"{one.benchmark.name}: a profile makes rewards that are not finite")
        sd = found[:, 0].std()
        if not sd > 0:
            raise InputError(f"{one.benchmark.name}: all rewards are {found[0, 0]}")
        is_target = any(one is t for t in target)
        shifts += [
            _shift(one, found[:, 0], found[:, p], sd, name, is_target)
            for p, name in enumerate(names, start=1)
        ]
        columns = dict(zip([BEFORE, *names], found.T, strict=True))
        accuracies += evaluate(
            one.benchmark,
            {name: column.tolist() for name, column in columns.items()},
            {name: list(one.cut) for name in columns} if one.cut else None,
        )
    return SteeringResult(shifts, accuracies, rewards)


def _shift(
    one: LatentSet, before: np.ndarray, after: np.ndarray, sd: float, name: str, target: bool
) -> Shift:
    moved = after - before

    def mean(rows: np.ndarray) -> Estimate:
        return bootstrap((moved[rows] / sd).tolist(), one.groups[rows].tolist())

    everything = np.ones(len(moved), bool)
    changed = changed_pairs(one.pairs, before, after)
    prompts = one.item_groups[one.pairs[:, 2]]
    return Shift(
        one.benchmark.name,
        name,
        target,
        len(one.benchmark.items),
        float(sd),
        mean(one.chosen),
        mean(~one.chosen),
        mean(everything),
        bootstrap(changed.tolist(), prompts.tolist()),
        float((moved != 0).mean()),
    )
