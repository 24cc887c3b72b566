"""Results as Markdown: `python benches/tables.py PAGE.md RESULT.json...` fills the page's places.

A place is whatever stands between two comments, and names a case of a suite:

    <!-- bench: single -->
    <!-- /bench -->

It gets a table of the case's rows and a line with what the numbers depend on. Numbers in the
documentation are only ever written by this file; `run.py --markdown PAGE.md` does it after a run.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import compare
from report import number
from suite import BenchError, Ratio, Row

PLACE = re.compile(r"<!-- bench: (.+?) -->\n(.*?)<!-- /bench -->", re.DOTALL)

#: Key of Row.accuracy -> (column, how a number is written).
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "tokens_per_s": ("tokens/s", "{:,.0f}".format),
    "p50_ms": ("p50 ms", number),
    "p99_ms": ("p99 ms", number),
    "memory_mib": ("server MiB", "{:.0f}".format),
    "growth_mib": ("growth MiB", "{:+.1f}".format),
    "minutes": ("minutes", "{:.1f}".format),
    "requests": ("requests", "{:.0f}".format),
    "answered": ("scored", "{:.0f}".format),
    "refused": ("refused", "{:.0f}".format),
    "lost": ("lost", "{:.0f}".format),
    "p99_429_ms": ("p99 refusal ms", number),
    "base_mib": ("MiB at start", "{:.0f}".format),
    "loading_peak_mib": ("peak loading", "{:.0f}".format),
    "loaded_mib": ("loaded", "{:.0f}".format),
    "scoring_peak_mib": ("peak scoring", "{:.0f}".format),
    "state_error": ("error of the state", "{:.4f}".format),
    "error_over_bf16": ("over bf16's", "{:.2f}".format),
    "spearman_probes": ("Spearman of probes", "{:.4f}".format),
    "spearman": ("Spearman of rewards", "{:.4f}".format),
    "accuracy_percent": ("accuracy %", "{:.1f}".format),
    "points": ("points", "{:+.2f}".format),
    "packing_error": ("alone or packed", "{:.0e}".format),
}


def speedup(ratio: Ratio) -> str:
    """From a ratio of times."""
    return f"{1 / ratio.value:.2f} ({1 / ratio.p80:.2f}-{1 / ratio.p20:.2f})"


def reference(name: str, ratio: Ratio) -> tuple[str, str]:
    """(column, cell): times faster than a pipeline, or times a floor's time."""
    if name.startswith(("published", "1 process")):
        return f"times {name}", speedup(ratio)
    if name == "offline":
        return "% of offline", f"{100 / ratio.value:.0f}"
    return f"x {name}", f"{ratio.value:.2f} ({ratio.p20:.2f}-{ratio.p80:.2f})"


def cells(row: Row) -> dict[str, str]:
    """Column to text, without those that the row has nothing for."""
    found = {"": row.name}
    if row.ms is not None:
        found["ms (p20-p80)"] = f"{number(row.ms)} ({number(row.p20_ms)}-{number(row.p80_ms)})"
    elif row.note and not row.accuracy:
        found["ms (p20-p80)"] = row.note  # why it did not run
    for key, value in row.accuracy.items():
        if key.startswith("points_"):  # in the column of points
            continue
        title, text = FIGURES.get(key, (key, "{:.3g}".format))
        found[title] = text(value)
    if "points_low" in row.accuracy:
        low, high = (row.accuracy[f"points_{end}"] for end in ("low", "high"))
        found["points"] += f" [{low:+.1f}, {high:+.1f}]"
    for name, ratio in row.ratios.items():
        if name != row.name:
            title, cell = reference(name, ratio)
            found[title] = cell
    return found


def table(rows: Sequence[Row]) -> str:
    """One table for each workload and dtype, its name above it."""
    texts = []
    for group in dict.fromkeys((row.shape, row.dtype) for row in rows):
        mine = [cells(row) for row in rows if (row.shape, row.dtype) == group]
        columns = list(dict.fromkeys(column for cell in mine for column in cell))
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
        lines += [[cell.get(column, "") for column in columns] for cell in mine]
        title = ", ".join(filter(None, group))
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        texts.append(f"{title}\n\n{body}\n")
    return "\n".join(texts)


def header_line(header: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in header.items())


def fill(page: Path, results: Sequence[tuple[dict[str, str], Sequence[Row]]]) -> list[str]:
    """Rewrites the page's places that the results have rows of; the cases that were written."""
    try:
        text = page.read_text("utf-8")
    except OSError as error:
        raise BenchError(f"{page}: {error.strerror}") from None
    tables = {}
    for header, rows in results:
        for case in dict.fromkeys(row.case for row in rows):
            mine = [row for row in rows if row.case == case]
            tables[case] = f"{table(mine)}\n*{header_line(header)}*\n"
    places = PLACE.findall(text)
    written = [case for case, _ in places if case in tables]
    if not written:
        names = ", ".join(case for case, _ in places) or "none"
        raise BenchError(f"{page}: no place for {', '.join(tables)}; its places: {names}")

    def replaced(match: re.Match[str]) -> str:
        case = match[1]
        body = tables.get(case)
        return match[0] if body is None else f"<!-- bench: {case} -->\n{body}<!-- /bench -->"

    staging = page.with_name(page.name + ".new")
    staging.write_text(PLACE.sub(replaced, text), "utf-8")
    os.replace(staging, page)
    return written


def main(argv: Sequence[str]) -> int:
    if len(argv) < 2:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    page, *files = map(Path, argv)
    try:
        for case in fill(page, [compare.read(file) for file in files]):
            print(f"{page}: {case}")
    except BenchError as error:
        print(f"tables.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
