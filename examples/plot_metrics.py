"""The curves of `sarm train-sae`: python examples/plot_metrics.py OUT/metrics.jsonl curves.svg."""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

SHARES = ("fvu", "fvu/turn-end", "fvu/scored", "fvu/sentence", "fvu/token", "dead")


def plot(metrics: Path, out: Path) -> None:
    """Unexplained variance by kind of position and the share of dead latents, over steps."""
    entries = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    for name in SHARES:
        points = [(e["step"], e[name]) for e in entries if e.get(name)]
        if points:
            axis.loglog(*zip(*points, strict=True), label=name)
    axis.set_xlabel("steps")
    axis.set_ylabel("share")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(out)


if __name__ == "__main__":
    plot(*map(Path, sys.argv[1:3]))
