"""Timing that can be trusted: warm-up, several runs, alternating candidates, medians and ratios.

Candidates take turns, A B C A B C ..., so that a clock that drifts and a neighbour that wakes up
hit all of them alike; compare the ratios inside one run, never milliseconds of two runs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from suite import Candidates, Missing, Ratio

# A sample shorter than this repeats its call: the timer, and a GPU's launch, cost microseconds.
SAMPLE_MS = 2.0
MAX_CALLS = 1000
# A candidate whose runs would take longer than this gets fewer of them, but MIN_RUNS.
BUDGET_S = 5.0
MIN_RUNS = 3


def measure(
    candidates: Candidates, device: str, runs: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(milliseconds per call of every run, why the others could not run) by candidate.

    Slow candidates take part in the first rounds only.
    """
    failed = {name: str(call) for name, call in candidates.items() if isinstance(call, Missing)}
    ready: dict[str, tuple[Callable[[], Any], int, int]] = {}
    for name, call in candidates.items():
        if isinstance(call, Missing):
            continue
        try:
            # The first call compiles, fills the libraries' caches, builds lazy inputs.
            ms = sample(call, device, 1)
            if ms < 100 or "compiled" in name:
                ms = sample(call, device, 1)
        except Exception as error:
            if name.startswith("sarm"):
                raise
            failed[name] = why(error)  # a baseline may be unable to run; sarm may not
            continue
        calls = min(MAX_CALLS, max(1, math.ceil(SAMPLE_MS / ms)))
        ready[name] = call, calls, min(runs, max(MIN_RUNS, int(1e3 * BUDGET_S / (ms * calls))))
    times: dict[str, list[float]] = {name: [] for name in ready}
    for run in range(runs):
        for name, (call, calls, most) in ready.items():
            if run < most:
                times[name].append(sample(call, device, calls))
    return times, failed


def why(error: Exception) -> str:
    """One line for a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:80] if str(error) else ''}"
    )


def sample(call: Callable[[], Any], device: str, calls: int) -> float:
    """Milliseconds per call."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return 1e3 * (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def quantile(values: list[float], q: float) -> float:
    """By linear interpolation."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def ratio(times: list[float], reference: list[float]) -> Ratio:
    """Medians divided; the spread is that of the ratios of the rounds that both took part in."""
    pairs = [t / r for t, r in zip(times, reference, strict=False)]
    value = statistics.median(times) / statistics.median(reference)
    return Ratio(value, quantile(pairs, 0.2), quantile(pairs, 0.8))
