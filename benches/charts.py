"""Plots of rows, by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite import Row

FORMATS = (".svg", ".png", ".pdf")


def grid(panels: int, height: float) -> tuple[Any, list]:
    """(figure, `panels` axes), two a line."""
    # Without pyplot, which would pick a display's backend and keep every figure.
    from matplotlib.figure import Figure

    lines = -(-panels // 2)
    figure = Figure(figsize=(11, max(2.5, lines * height)), layout="constrained")
    axes = figure.subplots(lines, min(2, panels), squeeze=False).flatten().tolist()
    for spare in axes[panels:]:
        spare.set_visible(False)
    return figure, axes[:panels]


def bars(rows: Sequence[Row], floors: Sequence[str], path: Path) -> None:
    """Times as multiples of the floor with p20-p80, a panel for each case and dtype."""
    panels: dict[str, list[tuple[str, Any]]] = {}
    for row in rows:
        ratio = next((row.ratios[f] for f in floors if f in row.ratios), None)
        if ratio is not None and row.name not in floors:
            bar = (f"{row.name}\n{row.shape}", ratio)
            panels.setdefault(f"{row.case}, {row.dtype}", []).append(bar)
    figure, axes = grid(max(1, len(panels)), 0.6 + 0.45 * max(map(len, panels.values()), default=1))
    for axis, (title, entries) in zip(axes, panels.items(), strict=False):
        labels, ratios = zip(*entries, strict=True)
        values = [r.value for r in ratios]
        spread = [
            [max(0.0, r.value - r.p20) for r in ratios],
            [max(0.0, r.p80 - r.value) for r in ratios],
        ]
        colors = ["#c44e52" if "sarm" in label else "#8c8c8c" for label in labels]
        positions = range(len(labels))
        axis.barh(positions, values, xerr=spread, color=colors, ecolor="black")
        axis.set_yticks(positions, labels, fontsize=6)
        axis.invert_yaxis()
        axis.axvline(1.0, color="black", linestyle=":")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("time / floor")
    figure.savefig(path)


def lines(
    panels: dict[str, dict[str, list[tuple[float, float]]]],
    path: Path,
    *,
    ylabel: str = "ms",
    linear: bool = True,
) -> None:
    """{panel: {line: [(size, y)]}} on two logarithmic axes; `linear`: with a line of slope 1."""
    figure, axes = grid(max(1, len(panels)), 3.6)
    for axis, (title, series) in zip(axes, panels.items(), strict=False):
        for name, points in series.items():
            axis.loglog(*zip(*sorted(points), strict=True), marker="o", label=name)
        (x0, y0), (x1, _) = (sorted(next(iter(series.values())))[end] for end in (0, -1))
        if linear:
            axis.loglog((x0, x1), (y0, y0 * x1 / x0), color="grey", linestyle=":", label="linear")
        sizes = sorted({x for points in series.values() for x, _ in points})
        axis.set_xticks(sizes, [f"{int(x):,}" for x in sizes], fontsize=7, rotation=30)
        axis.set_xticks([], minor=True)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(title.split(" over ")[-1].split(",")[0])
        axis.set_ylabel(ylabel)
        axis.legend(fontsize=7)
    figure.savefig(path)
