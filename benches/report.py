"""Tables on the terminal."""

from __future__ import annotations

import roofline
from compare import Change
from rich.console import Console
from rich.table import Table
from suite import Options, Row, Shape

FLOOR_COLUMNS = ("GEMM alone", "copy of its bytes")
REFERENCES = {"x fp32 GEMM": "GEMM alone, fp32 upcast", "x published": "published dense"}


def console() -> Console:
    """Wide enough for a row when the output is a pipe or a file."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=170)


def print_rows(out: Console, rows: list[Row]) -> None:
    """One table a case; columns that no row of it fills are left out."""
    for case in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == case]
        columns = {name: [] for name in cells(mine[0])}
        for row in mine:
            for name, cell in cells(row).items():
                columns[name].append(cell)
        shown = {name: column for name, column in columns.items() if any(column)}
        table = Table(title=case, title_justify="left", box=None, pad_edge=False)
        for name in shown:
            left = name in ("shape", "dtype", "candidate", "note")
            table.add_column(name, justify="left" if left else "right", no_wrap=name != "note")
        group = None
        for values, row in zip(zip(*shown.values(), strict=True), mine, strict=True):
            if group not in (None, (row.shape, row.dtype)):
                table.add_section()
                table.add_row()
            group = (row.shape, row.dtype)
            table.add_row(*values)
        out.print(table)
        out.print()


def cells(row: Row) -> dict[str, str]:
    """Column to text, "" for what the row does not have."""
    floor = next((row.ratios[f] for f in FLOOR_COLUMNS if f in row.ratios), None)
    texts = {
        "shape": row.shape,
        "dtype": row.dtype,
        "candidate": row.name,
        "ms (p20-p80)": ""
        if row.ms is None
        else f"{number(row.ms)} ({number(row.p20_ms)}-{number(row.p80_ms)})",
        "x floor": f"{floor.value:.2f}" if floor else "",
        "% of floor": "" if row.percent_of_floor is None else f"{row.percent_of_floor:.0f}",
    }
    for column, reference in REFERENCES.items():
        ratio = row.ratios.get(reference)
        texts[column] = f"{ratio.value:.2f}" if ratio else ""
    texts["peak MiB"] = "" if row.peak_mib is None else f"{row.peak_mib:.1f}"
    accuracy = row.accuracy
    texts["value error"] = f"{accuracy['error']:.0e}" if "error" in accuracy else ""
    texts["indices"] = f"{100 * accuracy['agree']:.2f} %" if "agree" in accuracy else ""
    texts["note"] = row.note
    return texts


def number(ms: float) -> str:
    """Three digits that matter."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.3g}"


def print_changes(out: Console, found: list[Change], old: dict, new: dict) -> None:
    """Old and new ratio of every row, the flagged ones marked."""
    for key in ("device", "torch", "threads"):
        if old.get(key) != new.get(key):
            out.print(f"Note: {key} differs: {old.get(key)} before, {new.get(key)} now.")
    table = Table("case", "shape", "dtype", "candidate", "x", "before", "now", "%", "", box=None)
    for change in found:
        row = change.row
        table.add_row(
            row.case,
            row.shape,
            row.dtype,
            row.name,
            change.reference,
            f"{change.old.value:.3f}",
            f"{change.new.value:.3f}",
            f"{change.percent:+.1f}",
            "WORSE" if change.worse else "",
        )
    out.print(table)
    worse = sum(change.worse for change in found)
    out.print(f"{len(found)} ratios compared, {worse} worse by more than the runs' spread.")


def print_roofline(out: Console, options: Options, shapes: dict[str, tuple[Shape, ...]]) -> None:
    """Floor times of every case on every GPU of the table."""
    arithmetics = dict.fromkeys(a for d in options.dtypes for a in arithmetic(d))
    table = Table("case", "N, d, n_latents, k", "arithmetic", "GFLOP", "MB", box=None)
    for gpu in roofline.GPUS:
        table.add_column(f"{gpu.name} ms", justify="right")
    for case in roofline.CASES:
        for shape in options.shapes or shapes[case]:
            for kind in arithmetics:
                works = roofline.works(case, shape, 4 if kind in ("fp32", "tf32") else 2)
                table.add_row(
                    case,
                    str(shape),
                    kind,
                    f"{sum(work.flops for work in works) / 1e9:.3g}",
                    f"{sum(work.bytes for work in works) / 1e6:.3g}",
                    *(number(roofline.floor_ms(case, shape, kind, g)) for g in roofline.GPUS),
                )
    out.print(table)


def arithmetic(dtype: str) -> tuple[str, ...]:
    """fp32 data multiply on fp32 units or, where PyTorch may, on tensor cores as TF32."""
    return ("fp32", "tf32") if dtype == "fp32" else (dtype,)


def print_fractions(out: Console, rows: list[Row], name: str) -> None:
    """Measured time beside the floor of the GPU it was measured on."""
    gpu = roofline.gpu_by_name(name)
    if gpu is None:
        out.print(f"{name} is not in the roofline table: times only.")
    table = Table("case", "shape", "dtype", "candidate", "ms", "floor ms", "% of floor", box=None)
    for row in rows:
        if row.ms is None:
            continue
        floor = None
        if gpu is not None:
            floor = roofline.floor_ms(row.case, Shape.parse(row.shape), row.dtype, gpu)
        table.add_row(
            row.case,
            row.shape,
            row.dtype,
            row.name,
            number(row.ms),
            "" if floor is None else number(floor),
            "" if floor is None else f"{100 * floor / row.ms:.0f}",
        )
    out.print(table)
