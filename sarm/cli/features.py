"""`sarm features`: collect, look at, compare and export what every feature does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sarm.cli.app import app, stdout
from sarm.cli.options import (
    Dtype,
    MaxLength,
    Model,
    Quantization,
    SkipBad,
    Threads,
    open_scorer,
    report_bad,
    use_threads,
)
from sarm.progress import bars

features = typer.Typer(no_args_is_help=True, help="What every feature does, in one database.")
app.add_typer(features, name="features")

Database = Annotated[Path, typer.Argument(metavar="FEATURES.db", help="A feature database.")]


@features.command()
def collect(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Preferences, conversations or texts; several."),
    ],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The database that is written.")],
    contexts: Annotated[int, typer.Option(help="Of each kind a feature: top, sampled.")] = 20,
    window: Annotated[int, typer.Option(help="Tokens of a context.")] = 64,
    block: Annotated[int, typer.Option(help="Records made durable together.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the sampled contexts.")] = 0,
    overwrite: bool = False,
    max_length: MaxLength = 4096,
    dtype: Dtype = None,
    quantization: Quantization = None,
    threads: Threads = None,
    skip_bad: SkipBad = False,
) -> None:
    """Statistics and contexts of every feature, in one pass; run again, it resumes a killed run."""
    from sarm.data import BadRecords
    from sarm.features.collect import CollectOptions
    from sarm.features.collect import collect as run

    use_threads(threads)
    options = CollectOptions(contexts, window, block, seed)
    scorer = open_scorer(model, dtype, quantization, max_length)
    bad = BadRecords(skip=skip_bad)
    with bars() as add:
        bar = add("responses", None)
        report = run(
            scorer, sources, out, options, bad=bad, overwrite=overwrite, progress=bar.advance
        )
    stdout.print(
        f"{out}: {report.rows} responses ({report.resumed} from an earlier run), {report.alive} of "
        f"{scorer.model.sae.n_latents} features alive, {report.contexts} contexts, "
        f"{report.truncated} cut to {max_length} tokens",
        soft_wrap=True,
    )
    report_bad(bad)
