"""`sarm explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from sarm.cli.app import app, stdout
from sarm.cli.options import (
    Dtype,
    MaxLength,
    Model,
    Quantization,
    SkipBad,
    open_scorer,
    report_bad,
)
from sarm.errors import InputError
from sarm.progress import bars


@app.command()
def explain(
    model: Model,
    source: Annotated[
        Path | None, typer.Argument(help="File with rows as for `score`, or preferences.")
    ] = None,
    row: Annotated[int, typer.Option(min=0, help="Which row of the file, from 0.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="All rows, as JSON lines into -o.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="With --all: the file.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Instead of a file.")] = None,
    response: Annotated[str | None, typer.Option(help="Instead of a file.")] = None,
    versus: Annotated[str | None, typer.Option(help="A second response to compare with.")] = None,
    top: Annotated[int, typer.Option(min=0, help="Features listed.")] = 20,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Reward and features along the response.")
    ] = False,
    reading: Annotated[
        str, typer.Option(help="Of --per-token: `ended` after each token, or its state `read`.")
    ] = "ended",
    features: Annotated[
        Path | None, typer.Option(help="A feature database whose labels are shown.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overwrite: bool = False,
    skip_bad: SkipBad = False,
    max_length: MaxLength = 4096,
    dtype: Dtype = None,
    quantization: Quantization = None,
) -> None:
    """A reward, feature by feature; the contributions sum to it. Of two responses: a margin."""
    if every and (source is None or out is None):
        raise InputError("explain: --all needs a file and -o")
    if not every and out is not None:
        raise InputError("explain: -o goes with --all; a page is written with --html")
    sides = [] if every else _sides(source, row, prompt, response, versus)
    if per_token and len(sides) != 1:
        raise InputError("explain: --per-token is of one response")
    scorer = open_scorer(model, dtype, quantization, max_length)
    names = _names(features, scorer)
    if every and source is not None and out is not None:
        _file(scorer, source, out, top, names, overwrite, skip_bad)
        return
    shown, page, fields = _views(scorer, sides, top, names, per_token, reading)
    if html is not None:
        from sarm.checkpoint import replace_file

        with replace_file(html) as file:
            file.write(page)
        stdout.print(f"{html}: written", soft_wrap=True)
    elif as_json:
        stdout.print_json(json.dumps(fields))
    else:
        for part in shown:
            stdout.print(part)


def _views(scorer, sides: list, top: int, names: dict, per_token: bool, reading: str):
    """What is printed, the page, and the fields of the JSON."""
    from dataclasses import asdict

    from sarm.interpret import html, terminal
    from sarm.interpret.attribution import compare, named
    from sarm.interpret.trace import trace

    if per_token:
        kind: Literal["ended", "read"] = reading  # type: ignore[assignment]  # checked there
        found = trace(scorer, sides[0], top, kind, names)
        table = terminal.explanation_table(found.explanation)
        return [terminal.trace_text(found), table], html.trace_page(found), asdict(found)
    if len(sides) == 2:
        comparison = compare(scorer, sides[0], sides[1], top, names)
        fields = {"margin": comparison.margin, **asdict(comparison)}
        page = html.comparison_page(comparison)
        return [terminal.comparison_table(comparison)], page, fields
    explanation = named(scorer.explain(sides[0], top), names)
    page = html.explanation_page(explanation)
    return [terminal.explanation_table(explanation)], page, asdict(explanation)


def _file(scorer, source, out, top, names, overwrite, skip_bad) -> None:
    from sarm.data import BadRecords
    from sarm.interpret.explainfile import explain_file

    bad = BadRecords(skip=skip_bad)
    with bars() as add:
        bar = add("rows", None)
        report = explain_file(
            scorer,
            source,
            out,
            top=top,
            names=names,
            bad=bad,
            overwrite=overwrite,
            progress=bar.advance,
        )
    stdout.print(
        f"{out}: {report.scored + report.resumed} rows ({report.resumed} from an earlier run), "
        f"{report.truncated} cut",
        soft_wrap=True,
    )
    report_bad(bad)


def _names(features: Path | None, scorer) -> dict[int, str]:
    from sarm.features import FeatureStore

    if features is None:
        return {}
    with FeatureStore(features) as store:
        store.check(scorer.model, head=False)  # labels hold for a steered copy too
        return store.names()


def _sides(source, row: int, prompt: str | None, response: str | None, versus: str | None) -> list:
    """One conversation, or two to compare."""
    import itertools

    from sarm.data import read_records, to_conversation, to_pair

    if source is None:
        if prompt is None or response is None:
            raise InputError("explain: pass a file, or --prompt and --response")
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    else:
        record = next(itertools.islice(read_records(source), row, None), None)
        if record is None:
            raise InputError(f"{source}: has no row {row}")
        if "chosen" in record.fields and versus is None:
            pair = to_pair(record)
            return [pair.chosen, pair.rejected]
        turns = to_conversation(record)
    if versus is None:
        return [turns]
    return [turns, [*turns[:-1], {"role": "assistant", "content": versus}]]
