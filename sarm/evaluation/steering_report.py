"""The report of `sarm steer eval`: JSON, Markdown and plots of the distributions, together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from sarm.checkpoint import replace_files
from sarm.evaluation.metrics import Estimate
from sarm.evaluation.report import COLORS, cells, headings
from sarm.evaluation.steering import Shift, SteeringResult

HEADINGS = ["benchmark", "profile", "items", "chosen", "rejected", "all", "order changed", "moved"]


def shift_cells(shift: Shift) -> list[str]:
    """One row under `HEADINGS`: shifts in sd, shares in percent."""
    return [
        f"{shift.benchmark}{' (target)' if shift.target else ''}",
        shift.profile,
        f"{shift.items:,}",
        *(_in_sd(e) for e in (shift.chosen, shift.rejected, shift.all)),
        f"{100 * shift.changes.value:.2f} [{100 * shift.changes.low:.2f}, "
        f"{100 * shift.changes.high:.2f}]",
        f"{100 * shift.moved:.1f}",
    ]


def write_steering_report(
    result: SteeringResult, settings: Mapping[str, Any], directory: str | Path
) -> None:
    """steering.json, steering.md and steering.svg: all of them or none."""
    with replace_files(directory) as staging:
        _plot(result, staging / "steering.svg")
        (staging / "steering.md").write_text(markdown(result, settings), "utf-8")
        page = json.dumps(
            {"settings": dict(settings), **result.to_json()}, indent=2, ensure_ascii=False
        )
        (staging / "steering.json").write_text(page + "\n", "utf-8")


def markdown(result: SteeringResult, settings: Mapping[str, Any]) -> str:
    """Two tables and how to read them."""
    lines = ["# What steering changes", ""]
    lines += table(HEADINGS, [shift_cells(shift) for shift in result.shifts])
    lines += [
        "",
        "Mean reward after minus before, in standard deviations of the benchmark's unsteered "
        "rewards; *order changed* and *moved* in percent of the chosen/rejected pairs and of the "
        "conversations. 95 % intervals by bootstrap over prompts.",
        "",
        *table(headings(result.accuracies), [cells(one) for one in result.accuracies]),
        "",
        " · ".join(f"{name}: {value}" for name, value in settings.items()),
        "",
        "![Rewards before and after](steering.svg)",
    ]
    return "\n".join(lines) + "\n"


def table(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown lines; a bar in a cell is escaped."""
    every = [titles, ["---"] * 2 + ["--:"] * (len(titles) - 2), *rows]
    return ["| " + " | ".join(v.replace("|", "\\|") for v in row) + " |" for row in every]


def _in_sd(e: Estimate) -> str:
    value, low, high = (round(x, 3) + 0.0 for x in (e.value, e.low, e.high))  # no "-0.000"
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _plot(result: SteeringResult, path: Path) -> None:
    """Rewards before (filled) and after each profile (outlined), a panel for each benchmark."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    shown = {shift.benchmark: shift for shift in result.shifts}
    names = list(dict.fromkeys(shift.profile for shift in result.shifts))
    figure = Figure(figsize=(8, 2.2 * len(shown) + 0.4), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axis, (title, shift) in zip(axes, shown.items(), strict=True):
        rewards = result.rewards[title]
        low, high = np.quantile(rewards, [0.002, 0.998])
        bins = np.linspace(low, high, 41)
        axis.hist(rewards[:, 0], bins, color="#94a3b8", alpha=0.7, label="before")
        for p, name in enumerate(names, start=1):
            color = COLORS[(p - 1) % len(COLORS)]
            axis.hist(rewards[:, p], bins, histtype="step", lw=1.5, color=color, label=name)
        axis.set_title(f"{title}{' (target)' if shift.target else ''}", fontsize=9)
        axis.set_yticks([])
    axes[-1].set_xlabel("reward")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    with matplotlib.rc_context({"svg.hashsalt": "sarm"}):
        figure.savefig(path, metadata={"Date": None})
