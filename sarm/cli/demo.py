"""`sarm demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sarm.cli.app import app, stdout
from sarm.cli.options import Threads, use_threads


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("demo_out"),
    backbone: Annotated[
        str | None, typer.Option(help="Checkpoint directory, .gguf or hub id instead of SmolLM2.")
    ] = None,
    seed: int = 0,
    threads: Threads = None,
) -> None:
    """The whole job on a real model in minutes: SAE, head, explanation, steering, a report."""
    from sarm.demo.run import run_demo

    use_threads(threads)
    run_demo(out, backbone=backbone, seed=seed, console=stdout)
