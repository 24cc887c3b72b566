"""`sarm explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sarm.cli.app import app, stdout
from sarm.cli.options import Dtype, MaxLength, Model, Quantization, open_scorer
from sarm.errors import InputError


@app.command()
def explain(
    model: Model,
    source: Annotated[Path | None, typer.Argument(help="File with rows as for `score`.")] = None,
    row: Annotated[int, typer.Option(min=0, help="Which row of the file, from 0.")] = 0,
    prompt: Annotated[str | None, typer.Option(help="Instead of a file.")] = None,
    response: Annotated[str | None, typer.Option(help="Instead of a file.")] = None,
    versus: Annotated[str | None, typer.Option(help="A second response to compare with.")] = None,
    top: Annotated[int, typer.Option(min=0, help="Features listed.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    max_length: MaxLength = 4096,
    dtype: Dtype = None,
    quantization: Quantization = None,
) -> None:
    """A reward, feature by feature; the contributions sum to it. With --versus: a margin."""
    from dataclasses import asdict

    from sarm.interpret.attribution import compare
    from sarm.interpret.terminal import comparison_table, explanation_table

    conversation = _conversation(source, row, prompt, response)
    scorer = open_scorer(model, dtype, quantization, max_length)
    if versus is None:
        explanation = scorer.explain(conversation, top)
        if as_json:
            stdout.print_json(json.dumps(asdict(explanation)))
        else:
            stdout.print(explanation_table(explanation))
        return
    other = [*conversation[:-1], {"role": "assistant", "content": versus}]
    comparison = compare(scorer, conversation, other, top)
    if as_json:
        stdout.print_json(json.dumps({"margin": comparison.margin, **asdict(comparison)}))
    else:
        stdout.print(comparison_table(comparison))


def _conversation(source, row: int, prompt: str | None, response: str | None) -> list[dict]:
    import itertools

    from sarm.data import read_records, to_conversation

    if source is None:
        if prompt is None or response is None:
            raise InputError("explain: pass a file, or --prompt and --response")
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    record = next(itertools.islice(read_records(source), row, None), None)
    if record is None:
        raise InputError(f"{source}: has no row {row}")
    return to_conversation(record)
