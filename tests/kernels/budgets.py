"""Prints registers, spills, shared memory and occupancy of every compiled kernel as a table.

python tests/kernels/budgets.py [CAPABILITY ...]
"""

import json
import os
import subprocess
import sys
from pathlib import Path

COMPILED = Path(__file__).parent / "compiled.py"


def compile_all(*arguments, **environment):
    """The output of compiled.py, run in a process without Triton's interpreter."""
    environment = {**os.environ, **environment}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, str(COMPILED), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if result.returncode != 0:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout)


def table(rows):
    """Markdown."""
    lines = [
        "| kernel | sm | dtype | registers | spills | shared KiB | warps/SM (at least) | tensor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row["kernel"],
            row["capability"],
            row["dtype"],
            row["registers"],
            row["stack"],
            f"{row['shared'] / 1024:.1f}",
            f"{row['warps_per_sm']} ({row['budget']})",
            ", ".join(row["instructions"]),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from sarm.kernels.form import CAPABILITIES

    print(table(compile_all(*(sys.argv[1:] or CAPABILITIES))))
