"""Suite `ops-scaling`: topk_encode over n_latents and over N, beside the GEMM alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import cases
import charts
from measure import measure
from ops import timing_rows
from suite import BenchError, Options, Row, Shape

BASE = Shape(1024, 576, 18432, 64)
# Of the base shape: n_latents 4,608 ... 262,144 and N 256 ... 8,192.
LATENTS = tuple(map(Fraction, ("1/4", "1/2", "1", "2", "4", "8", "128/9")))
TOKENS = tuple(map(Fraction, ("1/4", "1/2", "1", "2", "4", "8")))
NAMES = (cases.GEMM, cases.SARM)


def run(options: Options) -> list[Row]:
    """One sweep an axis. --shape N,D,L,K replaces the base that is swept around."""
    bases = options.shapes or (BASE,)
    if len(bases) > 1:
        raise BenchError(f"--suite ops-scaling takes one --shape, got {len(bases)}")
    if not any(options.wants("topk_encode", name) for name in NAMES):
        raise BenchError(f"--only {options.only!r} selects nothing; candidates: {', '.join(NAMES)}")
    table = []
    for dtype in options.dtypes:
        for axis in ("n_latents", "N"):
            points = list(sweep(bases[0], axis))
            rows = [row for shape in points for row in point(axis, shape, dtype, options)]
            for name in NAMES:
                mine = [row for row in rows if row.name == name]
                mine[-1].note = f"time ~ {axis}^{slope(mine, axis):.2f}"
            table += rows
    return table


def sweep(base: Shape, axis: str) -> Iterator[Shape]:
    """Shapes along one axis; those with fewer than k latents are left out."""
    if axis == "N":
        yield from (base._replace(n=max(1, int(base.n * f))) for f in TOKENS)
        return
    sizes = (int(base.n_latents * f) for f in LATENTS)
    yield from (base._replace(n_latents=size) for size in sizes if size >= base.k)


def point(axis: str, shape: Shape, dtype: str, options: Options) -> list[Row]:
    """Both candidates at one shape."""
    options.log(f"topk_encode over {axis}  {shape}  {dtype}")
    every = cases.topk_encode(cases.Problem(shape, dtype, options.device))
    times, failed = measure({name: every[name] for name in NAMES}, options.device, options.runs)
    return timing_rows(f"topk_encode over {axis}", str(shape), dtype, list(NAMES), times, failed)


def size(row: Row, axis: str) -> int:
    """The swept number, from the row's shape."""
    shape = Shape.parse(row.shape)
    return shape.n if axis == "N" else shape.n_latents


def slope(rows: list[Row], axis: str) -> float:
    """Least-squares exponent of time over size: 1 is linear."""
    points = [(math.log(size(row, axis)), math.log(row.ms)) for row in rows if row.ms]
    if len(points) < 2:
        return math.nan
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else math.nan


def plot(rows: list[Row], path: Path) -> None:
    """Lines: time over size on two logarithmic axes."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row.ms is not None:
            axis = row.case.removeprefix("topk_encode over ")
            lines = panels.setdefault(f"{row.case}, {row.dtype}", {})
            lines.setdefault(row.name, []).append((size(row, axis), row.ms))
    charts.lines(panels, path)
