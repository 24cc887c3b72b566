"""Reports of `sarm audit`: tables as CSV and JSON, the trade as a plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import numpy as np

from sarm.audit.debias import LEVELS, Outcome, Point, Spread, Trade
from sarm.audit.drift import Drift
from sarm.audit.preferences import PreferenceAudit
from sarm.audit.style import StyleScores
from sarm.checkpoint import replace_file, replace_files
from sarm.evaluation.report import COLORS
from sarm.evaluation.steering_report import table
from sarm.steering.files import profile_fields, write_profile


def write_style(styles: Sequence[StyleScores], path: str | Path) -> None:
    """A CSV row for every feature and style, largest reward part first."""
    names = ("effect", "low", "high", "reward", "reward_low", "reward_high")
    with replace_file(path) as file:
        rows = csv.writer(file)
        rows.writerow(["style", "feature", *names])
        for one in styles:
            for j in np.argsort(-np.abs(one.reward), kind="stable"):
                rows.writerow([one.style, j, *(f"{getattr(one, n)[j]:.6g}" for n in names)])


TRADE_HEADINGS = ["profile", "features", *LEVELS, "Δ easy", "Δ normal", "Δ hard"]


def trade_cells(point: Point | None, base: dict[str, float], chosen: bool) -> list[str]:
    """Held-out accuracies in percent and their change in points."""
    held = point.held if point else base
    title = f"{point.kind} {point.strength:g}" if point else "as it is"
    return [
        f"{title}{' (chosen)' if chosen else ''}",
        f"{len(point.profile.changes):,}" if point else "0",
        *(f"{100 * held[name]:.1f}" for name in LEVELS),
        *(f"{100 * (held[name] - base[name]):+.1f}" for name in LEVELS),
    ]


SPREAD_HEADINGS = ["held-out change, points", *LEVELS]


def spread_cells(spread: Spread) -> list[list[str]]:
    """Mean, standard deviation, least and largest change over the splits."""
    rows = (("mean", spread.mean), ("least", spread.low), ("largest", spread.high))
    cells = [[title, *(f"{100 * of[name]:+.1f}" for name in LEVELS)] for title, of in rows]
    return [*cells, ["sd", *(f"{100 * spread.sd[name]:.1f}" for name in LEVELS)]]


def spread_text(spread: Spread, max_drop: float) -> str:
    """How often the bound on easy and normal held."""
    points = f"{100 * max_drop:g} point{'' if max_drop == 0.01 else 's'}"
    text = (
        f"{spread.splits} random splits: easy and normal each lose at most {points} in "
        f"{100 * spread.each:.0f} % of them, and on average in {100 * spread.together:.0f} %"
    )
    return f"{text}; nothing was chosen in {spread.unchanged}" if spread.unchanged else text


def write_trade(
    found: Trade,
    directory: str | Path,
    *,
    max_drop: float,
    splits: Sequence[Outcome] = (),
    model: str | None = None,
) -> None:
    """debias.json, debias.md, debias.svg and, where a point was chosen, profile.yaml.

    Args:
        splits: the same on random splits.  model: fingerprint of the features, for the profile.
    """
    with replace_files(directory) as staging:
        if found.chosen:
            write_profile(replace(found.chosen.profile, model=model), staging / "profile.yaml")
        spread = Spread.of(splits, max_drop) if splits else None
        rows = [trade_cells(None, found.held, False)]
        rows += [trade_cells(p, found.held, p is found.chosen) for p in found.points]
        text = [
            "# Style against accuracy",
            "",
            *table(TRADE_HEADINGS, rows),
            "",
            f"RM-Bench accuracy in percent on {found.held_prompts:,} prompts that took no part in "
            f"fitting or choosing; `profile.yaml` was fitted and chosen on the other "
            f"{found.fit_prompts:,}.",
            "",
            "![The trade](debias.svg)",
        ]
        if spread:
            text += ["", "## Other splits", "", *table(SPREAD_HEADINGS, spread_cells(spread))]
            text += [
                "",
                f"{spread_text(spread, max_drop)}. Each one fitted, chose and judged anew.",
            ]
        (staging / "debias.md").write_text("\n".join(text) + "\n", "utf-8")
        page = {
            "fitted": found.fitted,
            "held": found.held,
            "fit_prompts": found.fit_prompts,
            "held_prompts": found.held_prompts,
            "max_drop": max_drop,
            "points": [
                {
                    "kind": p.kind,
                    "strength": p.strength,
                    "chosen": p is found.chosen,
                    "fitted": p.fitted,
                    "error": p.error,
                    "held": p.held,
                    "profile": profile_fields(p.profile),
                }
                for p in found.points
            ],
            "splits": spread and {**asdict(spread), "outcomes": [asdict(one) for one in splits]},
        }
        (staging / "debias.json").write_text(json.dumps(page, indent=2) + "\n", "utf-8")
        _plot_trade(found, staging / "debias.svg")


def _plot_trade(found: Trade, path: Path) -> None:
    """Change of hard over change of easy and of normal, held out, in points."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, level in zip(axes, ("easy", "normal"), strict=True):
        for color, kind in zip(COLORS, ("multiply", "ablate"), strict=False):
            points = [p for p in found.points if p.kind == kind]
            x, y = (
                [0.0, *(100 * (p.held[name] - found.held[name]) for p in points)]
                for name in (level, "hard")
            )
            axis.plot(x, y, "o-", ms=4, color=color, label=kind)
        if found.chosen:
            at = [100 * (found.chosen.held[name] - found.held[name]) for name in (level, "hard")]
            axis.plot(*at, "s", ms=9, mfc="none", color="#0f172a", label="chosen")
        axis.axhline(0, color="#94a3b8", lw=0.8)
        axis.axvline(0, color="#94a3b8", lw=0.8)
        axis.set_xlabel(f"change of {level}, points")
    axes[0].set_ylabel("change of hard, points")
    axes[0].legend()
    with matplotlib.rc_context({"svg.hashsalt": "sarm"}):
        figure.savefig(path, metadata={"Date": None})


def drift_fields(drift: Drift, top: int = 20) -> dict:
    """The verdict, and the significant features that earn or cost most."""
    order = np.argsort(-np.abs(drift.earned) * drift.significant, kind="stable")[:top]
    return {
        "rows": drift.rows,
        "drifted": drift.drifted,
        "suspicious": drift.suspicious,
        "distance": drift.distance,
        "threshold": drift.threshold,
        "p": drift.p,
        "reward_change": drift.reward,
        "reward_p": drift.reward_p,
        "alpha": drift.alpha,
        "significant_features": int(drift.significant.sum()),
        "features": [
            {"feature": int(j), "z": float(drift.z[j]), "earned": float(drift.earned[j])}
            for j in order
            if drift.significant[j]
        ],
    }


def write_suspects(audit: PreferenceAudit, path: str | Path) -> None:
    """JSON lines: every pair whose label the features contradict, worst first."""
    with replace_file(path) as file:
        for one in audit.suspects:
            row = {
                "where": one.where,
                "margin": one.margin,
                "probability": one.probability,
                "features": [{"feature": j, "part": part} for j, part in one.features],
            }
            file.write(json.dumps(row) + "\n")
