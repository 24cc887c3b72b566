"""`sarm score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sarm.cli.app import app, stdout
from sarm.cli.options import (
    Dtype,
    MaxLength,
    Model,
    Out,
    Quantization,
    SkipBad,
    Threads,
    open_scorer,
    report_bad,
    use_threads,
)
from sarm.progress import bars


@app.command()
def score(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN.jsonl",
            help="Rows with `messages`, or `prompt` and `completion` or `response`.",
        ),
    ],
    model: Model,
    out: Out,
    max_length: MaxLength = 4096,
    block: Annotated[int, typer.Option(min=1, help="Rows made durable together.")] = 256,
    overwrite: bool = False,
    dtype: Dtype = None,
    quantization: Quantization = None,
    threads: Threads = None,
    skip_bad: SkipBad = False,
) -> None:
    """Score a file in order; a killed run is taken up by the same command."""
    from sarm.data import BadRecords
    from sarm.scorefile import score_file

    use_threads(threads)
    scorer = open_scorer(model, dtype, quantization, max_length)
    bad = BadRecords(skip=skip_bad)
    with bars() as add:
        bar = add("rows", _count_rows(source))
        report = score_file(
            scorer, source, out, bad=bad, block=block, overwrite=overwrite, progress=bar.advance
        )
    stdout.print(
        f"{out}: {report.scored + report.resumed} rows ({report.resumed} from an earlier "
        f"run), {report.truncated} cut to {max_length} tokens",
        soft_wrap=True,
    )
    report_bad(bad)


def _count_rows(source: str) -> int | None:
    """Rows of a plain .jsonl, for the progress bar; None where counting costs a full read."""
    path = Path(source)
    if not (path.is_file() and path.suffix == ".jsonl"):
        return None
    with open(path, "rb") as lines:
        return sum(bool(line.strip()) for line in lines)
