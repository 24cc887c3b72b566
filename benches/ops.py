"""Suite `ops`: the five primitives, the encoder with the value head, and a step of SAE training."""

from __future__ import annotations

from pathlib import Path

import cases
import charts
import torch
from accuracy import Exact
from measure import measure, quantile, ratio
from memory import peak_on_cpu, peak_on_cuda
from suite import BenchError, Missing, Options, Row, Shape

LARGE_N = Shape(4096, 576, 18432, 64)
SMALL_N = Shape(256, 4096, 65536, 192)
SCORING = Shape(8, 4096, 65536, 192)
SHAPES = dict.fromkeys(cases.CASES, (LARGE_N,))
SHAPES["topk_encode"] = (LARGE_N, SMALL_N, SCORING)
SHAPES["sae_step"] = (LARGE_N, SMALL_N)


def run(options: Options) -> list[Row]:
    """Rows of every case that has a selected candidate."""
    selected = [case for case in cases.CASES if any(options.wants(case, n) for n in names(case))]
    if not selected:
        raise BenchError(
            f"--only {options.only!r} selects nothing; cases: {', '.join(cases.CASES)}; "
            f"candidates: {', '.join(dict.fromkeys(n for c in cases.CASES for n in names(c)))}"
        )
    table = []
    for case in selected:
        for shape in options.shapes or SHAPES[case]:
            for dtype in options.dtypes:
                options.log(f"{case}  {shape}  {dtype}")
                table += run_case(case, shape, dtype, options)
    return table


def names(case: str) -> list[str]:
    """The candidates of a case, from a problem small enough to cost nothing."""
    return list(cases.CASES[case](cases.Problem(Shape(1, 1, 1, 1), "bf16", "cpu")))


def run_case(case: str, shape: Shape, dtype: str, options: Options) -> list[Row]:
    """The floors and the published formula run always: the others are ratios to them."""
    torch.compiler.reset()  # else the shapes before count towards the limit on recompilations
    problem = cases.Problem(shape, dtype, options.device)
    candidates = {
        name: call
        for name, call in cases.CASES[case](problem).items()
        if name in (*cases.FLOORS, cases.PUBLISHED) or options.wants(case, name)
    }
    times, failed = measure(candidates, options.device, options.runs)
    rows = timing_rows(case, str(shape), dtype, list(candidates), times, failed)
    exact = Exact(problem) if case == "topk_encode" else None
    for row in rows:
        call = candidates[row.name]
        if row.ms is None or isinstance(call, Missing):
            continue
        if exact and row.name not in cases.FLOORS:
            row.accuracy = exact.compare(*call())
        if options.device == "cuda" and options.memory:
            row.peak_mib = peak_on_cuda(call)
    if options.device == "cpu" and options.memory:
        del problem, candidates, exact, call  # each process has its own inputs
        for row in rows:
            if row.ms is not None and row.name not in cases.FLOORS:
                args = (case, shape, dtype, options.device, row.name)
                row.peak_mib = peak_on_cpu(cases.build, *args)
    return rows


def timing_rows(
    case: str,
    shape: str,
    dtype: str,
    names: list[str],
    times: dict[str, list[float]],
    failed: dict[str, str],
) -> list[Row]:
    """Median, p20, p80 of each candidate, and its ratios to the references that ran."""
    references = [n for n in (*cases.FLOORS, cases.PUBLISHED) if n in times]
    rows = []
    for name in names:
        if name in failed:
            rows.append(Row(case, shape, dtype, name, note=failed[name]))
            continue
        runs = times[name]
        ratios = {r: ratio(runs, times[r]) for r in references}
        floor = next((ratios[f].value for f in (cases.GEMM, cases.COPY) if f in ratios), None)
        rows.append(
            Row(
                case,
                shape,
                dtype,
                name,
                *(quantile(runs, q) for q in (0.5, 0.2, 0.8)),
                ratios,
                None if floor is None else 100 / floor,
            )
        )
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """Bars: time over the floor, one panel a case and dtype."""
    charts.bars(rows, (cases.GEMM, cases.COPY), path)
