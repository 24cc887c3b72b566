"""`sarm steer`."""

from __future__ import annotations

from typing import Annotated

import typer

from sarm.cli.app import app, stdout
from sarm.cli.options import Model, Out
from sarm.errors import InputError


@app.command()
def steer(
    model: Model,
    out: Out,
    feature: Annotated[
        list[str], typer.Option("--feature", "-f", help="INDEX=FACTOR, repeatable.")
    ],
) -> None:
    """Write a checkpoint whose head multiplies the weights of some features."""
    from sarm.scorer import SARMScorer

    profile: dict[int, float] = {}
    for item in feature:
        index, _, factor = item.partition("=")
        try:
            profile[int(index)] = float(factor)
        except ValueError:
            raise InputError(f"--feature must be INDEX=FACTOR, got {item!r}") from None
    SARMScorer.from_pretrained(model).steer(profile).save_pretrained(out)
    stdout.print(f"{out}: {len(profile)} feature weights changed", soft_wrap=True)
