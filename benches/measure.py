"""Timing that can be trusted: warm-up, several runs, alternating candidates, medians and ratios."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate over the runs."""

    name: str
    runs: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.runs)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def measure(
    candidates: dict[str, Callable[[], object]], runs: int = 7, warmup: int = 2
) -> list[Timing]:
    """Times all candidates in turn, A B C A B C ..., so that a drifting clock hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in range(warmup + runs):
        for name, call in candidates.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if run >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return [Timing(name, values) for name, values in times.items()]


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def header(device: str) -> dict[str, str]:
    """What a number depends on: device, torch, threads, commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return {
        "device": f"{device} ({name})",
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "commit": commit or "unknown",
    }


def rows(timings: Sequence[Timing], floor: str, baseline: str) -> list[dict]:
    """Median, p20, p80, ratio to the floor and to the baseline, for each candidate."""
    median = {t.name: t.median for t in timings}
    return [
        {
            "name": t.name,
            "ms": t.median,
            "p20_ms": t.quantile(0.2),
            "p80_ms": t.quantile(0.8),
            "of_floor": t.median / median[floor],
            "of_baseline": t.median / median[baseline],
        }
        for t in timings
    ]
