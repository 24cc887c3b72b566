"""What every suite speaks: a shape, the options of a run, and rows of results.

A suite is one module of this folder with two functions, listed in run.py's table:

    run(options: Options) -> list[Row]            measures
    plot(rows: list[Row], path: Path) -> None     draws
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class Shape(NamedTuple):
    """N tokens, d_model, n_latents, k active latents."""

    n: int
    d_model: int
    n_latents: int
    k: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        try:
            shape = cls(*(int(part) for part in text.split(",")))
        except (TypeError, ValueError):
            raise ValueError(f"expected four integers N,D,L,K, got {text!r}") from None
        if min(shape) < 1 or shape.k > shape.n_latents:
            raise ValueError(f"N,D,L,K must be >= 1 and K <= L, got {text!r}")
        return shape

    def __str__(self) -> str:
        return ", ".join(map(str, self))


class BenchError(Exception):
    """Bad input: one line, exit code 2."""


class Missing(str):
    """Stands where a candidate would be and says why it cannot run."""


Candidates = dict[str, Callable[[], Any] | Missing]


@dataclass(frozen=True)
class Options:
    """What the command line asks of a suite."""

    device: str = "cpu"
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    shapes: tuple[Shape, ...] | None = None  # None: the suite's own
    runs: int = 5
    only: str | None = None
    memory: bool = True
    data: Path | None = None  # a folder with real conversations
    prompts: int = 40
    items: int = 100  # of each data set of suite agreement; 0: all
    model: Path | None = None  # a checkpoint instead of the suite's own
    quantization: str | None = None  # of the model that suite serve serves
    minutes: float = 0.0
    pairs: int = 16  # of suite train-rm
    shortest: bool = False  # the same
    micro_batch: int = 1  # the same
    max_length: int = 4096
    documents: int = 16  # of suite train-sae
    log: Callable[[str], None] = lambda line: None

    def wants(self, case: str, name: str) -> bool:
        """Whether --only, a pattern for a case, a candidate or case/candidate, selects this one."""
        texts = (case, name, f"{case}/{name}")
        return self.only is None or any(fnmatchcase(text, self.only) for text in texts)


class Ratio(NamedTuple):
    """Of the medians; p20 and p80 are of the runs' own ratios, so a drifting clock cancels."""

    value: float
    p20: float
    p80: float


@dataclass
class Row:
    """One candidate at one shape and dtype. None: not measured, or not applicable."""

    case: str
    shape: str
    dtype: str
    name: str
    ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    ratios: dict[str, Ratio] = field(default_factory=dict)
    percent_of_floor: float | None = None
    peak_mib: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies the row in another run."""
        return self.case, self.shape, self.dtype, self.name
