"""Benchmarks: `python benches/run.py [--suite ops] [--json FILE] [--device cpu|cuda]`.

Times are medians of alternating runs in one process on the machine that runs them; compare the
ratios, not the milliseconds. Run on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ops
import torch
from measure import header
from rich.console import Console
from rich.table import Table

SUITES = {"ops": ops.run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=sorted(SUITES), default="ops")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="N,D,L,K",
        help="instead of the suite's shapes; repeatable",
    )
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    kwargs = {"runs": arguments.runs}
    if arguments.shape:
        kwargs["shapes"] = [tuple(int(x) for x in text.split(",")) for text in arguments.shape]
    facts = header(arguments.device)
    rows = SUITES[arguments.suite](arguments.device, **kwargs)
    console = Console(highlight=False)
    console.print("  ".join(f"{name} {value}" for name, value in facts.items()))
    table = Table("N, d, n_latents, k", "", "ms (p20-p80)", "x GEMM", "x published", box=None)
    for row in rows:
        table.add_row(
            f"{row['N']}, {row['d_model']}, {row['n_latents']}, {row['k']}",
            row["name"],
            f"{row['ms']:.1f} ({row['p20_ms']:.1f}-{row['p80_ms']:.1f})",
            f"{row['of_floor']:.2f}",
            f"{row['of_baseline']:.2f}",
        )
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"header": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
