"""The demo's HTML page: one file, plots inline, nothing loaded from elsewhere."""

from __future__ import annotations

import io
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import matplotlib
import numpy as np

from sarm.checkpoint import replace_file

if TYPE_CHECKING:
    from sarm.demo.run import DemoResult

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREY = "#2563eb", "#d97706", "#64748b"


def write_report(result: DemoResult, categories: list[str], path: Path) -> Path:
    """Render the page for a demo run."""
    template = (files("sarm.demo") / "report.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        result=result,
        pairs=len(categories),
        accuracy_plot=_svg(_accuracy(result)),
        margin_plot=_svg(_margins(result)),
        contribution_plot=_svg(_contributions(result)),
        steering_plot=_svg(_steering(result)),
        shift=(result.steering.after - result.steering.before)[result.steering.active].mean()
        / result.steering.before.std(),
        total=sum(result.seconds.values()),
    )
    with replace_file(path) as file:
        file.write(page)
    return path


def _accuracy(result: DemoResult):
    figure, axes = plt.subplots(figsize=(7, 3.2))
    names = [*result.sarm.by_category, "all"]
    for offset, color, label, held in (
        (-0.18, BLUE, "SARM", result.sarm),
        (0.18, GREY, "dense probe", result.probe),
    ):
        estimates = [*held.by_category.values(), held.accuracy]
        value = np.array([e.value for e in estimates])
        low = value - [e.low for e in estimates]
        high = np.array([e.high for e in estimates]) - value
        axes.bar(
            np.arange(len(names)) + offset,
            100 * value,
            0.34,
            color=color,
            label=label,
            yerr=100 * np.array([low, high]),
            capsize=2,
            ecolor="#0f172a",
        )
    axes.axhline(50, color="#0f172a", lw=0.8, ls=":")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(0, 105)
    axes.set_ylabel("held-out accuracy, %")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure


def _margins(result: DemoResult):
    figure, axes = plt.subplots(figsize=(7, 2.4))
    margins = result.sarm.margins
    bins = np.histogram_bin_edges(margins, 30).tolist()
    axes.hist(margins[margins > 0], bins, color=BLUE, label="right")
    axes.hist(margins[margins <= 0], bins, color=ORANGE, label="wrong")
    axes.set_xlabel("held-out margin, reward(chosen) - reward(rejected)")
    axes.set_ylabel("pairs")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _contributions(result: DemoResult):
    differences = result.comparison.differences[::-1]
    figure, axes = plt.subplots(figsize=(7, 3.4))
    values = [d.value for d in differences]
    axes.barh(
        [str(d.feature) for d in differences],
        values,
        color=[BLUE if v > 0 else ORANGE for v in values],
    )
    axes.axvline(0, color="#0f172a", lw=0.8)
    axes.set_xlabel("part of the margin")
    axes.set_ylabel("feature")
    axes.tick_params(axis="y", labelsize=8)
    return figure


def _steering(result: DemoResult):
    steering = result.steering
    figure, axes = plt.subplots(figsize=(7, 2.4))
    active = steering.active
    both = np.concatenate([steering.before[active], steering.after[active]])
    bins = np.histogram_bin_edges(both, 30).tolist()
    axes.hist(steering.before[active], bins, color=GREY, alpha=0.7, label="before")
    axes.hist(steering.after[active], bins, histtype="step", color=ORANGE, lw=2, label="after")
    axes.set_xlabel(f"reward of the {active.sum()} answers with feature {steering.feature}")
    axes.set_ylabel("answers")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _svg(figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "sarm"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
