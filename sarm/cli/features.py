"""`sarm features`: collect, look at, compare and export what every feature does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sarm.checkpoint import replace_file
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
from sarm.errors import InputError
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


@features.command()
def show(
    database: Database,
    feature: Annotated[
        int | None, typer.Argument(help="One feature; without it, a list of features.")
    ] = None,
    order: Annotated[str, typer.Option(help="Of the list: by which column.")] = "contribution",
    limit: Annotated[int, typer.Option(min=1, help="Features, or contexts of each kind.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Write a page about the feature.")] = None,
) -> None:
    """Statistics, labels and contexts of a feature, or the features that matter most."""
    from rich.table import Table

    from sarm.features import FeatureStore
    from sarm.interpret.html import facts, feature_page
    from sarm.interpret.terminal import coloured, literal

    with FeatureStore(database) as store:
        if feature is None:
            if html is not None:
                raise InputError("features show: --html needs a feature")
            _list(store, order, limit)
            return
        found, labels = store.feature(feature), store.labels(feature)
        contexts = [c for kind in ("top", "sample") for c in store.contexts(feature, kind, limit)]
    if html is not None:
        with replace_file(html) as file:
            file.write(feature_page(found, labels, contexts))
        stdout.print(f"{html}: written", soft_wrap=True)
        return
    table = Table("", "", title=f"feature {feature}", box=None, show_header=False)
    for name, value in facts(found):
        table.add_row(name, value)
    for label in labels:
        table.add_row(literal(f"label ({label.method})"), literal(label.label))
    stdout.print(table)
    for context in contexts:
        stdout.print(f"\n{context.kind} {context.activation:+.4f}", literal(context.source))
        stdout.print(coloured(context.tokens, context.activations))


@features.command()
def search(
    database: Database,
    text: Annotated[str, typer.Argument(help="Words of labels or contexts.")],
    limit: Annotated[int, typer.Option(min=1)] = 20,
) -> None:
    """Features whose label or contexts hold all the words."""
    from rich.table import Table

    from sarm.features import FeatureStore
    from sarm.interpret.terminal import literal

    with FeatureStore(database) as store:
        hits = store.search(text, limit)
        table = Table("feature", "contribution", "where", "text", box=None)
        for hit in hits:
            value = f"{store.feature(hit.feature).contribution:+.5f}"
            shown = " ".join(hit.text.split())
            table.add_row(str(hit.feature), value, hit.where, literal(shown[-100:]))
    stdout.print(table)


@features.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A.db")],
    second: Annotated[Path, typer.Argument(metavar="B.db")],
    order: Annotated[str, typer.Option(help="z, contribution or mean.")] = "z",
    limit: Annotated[int, typer.Option(min=1)] = 20,
    model_a: Annotated[
        Path | None, typer.Option(help="Two models: the first one, matched by decoder cosine.")
    ] = None,
    model_b: Annotated[Path | None, typer.Option(help="Two models: the second one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, all features.")] = False,
) -> None:
    """Which features differ most between two data sets on one model, or between two models."""
    import json
    from dataclasses import asdict

    from rich.table import Table

    from sarm.features import FeatureStore
    from sarm.features.diff import diff as run
    from sarm.interpret.terminal import literal
    from sarm.modeling import SarmForSequenceClassification

    if (model_a is None) != (model_b is None):
        raise InputError("features diff: give --model-a and --model-b, or neither")
    with FeatureStore(first) as a, FeatureStore(second) as b:
        decoders = None
        if model_a is not None and model_b is not None:
            rows = []
            for store, path in ((a, model_a), (b, model_b)):
                model = SarmForSequenceClassification.from_pretrained(path)
                store.check(model)
                rows.append(model.sae.w_dec.detach().clone())
            decoders = (rows[0], rows[1])
        found = run(a, b, order, decoders=decoders)
    if as_json:
        stdout.print_json(json.dumps([{**asdict(d), "shift": d.shift} for d in found]))
        return
    partner = ["partner", "cosine"] if decoders else []
    table = Table(
        "feature", *partner, "frequency", "", "z", "contribution", "", "shift", "label", box=None
    )
    for d in found[:limit]:
        mark = "" if d.mutual else "?"
        table.add_row(
            str(d.feature),
            *([f"{d.partner}{mark}", f"{d.cosine:.3f}"] if decoders else []),
            *(f"{100 * f:.2f} %" for f in d.frequency),
            f"{d.z:+.1f}",
            *(f"{c:+.5f}" for c in d.contribution),
            f"{d.shift:+.5f}",
            literal(d.label or ""),
        )
    stdout.print(table)


@features.command()
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
    layout: Annotated[str, typer.Option("--format", help="neuronpedia or delphi.")],
    database: Annotated[
        Path | None, typer.Argument(metavar="[FEATURES.db]", help="neuronpedia: what to export.")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="delphi: responses, as for `collect`; repeatable.")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="delphi: the SARM.")] = None,
    model_id: Annotated[str, typer.Option(help="The model's name there.")] = "sarm",
    creator: Annotated[str, typer.Option(help="neuronpedia: user id of the rows' owner.")] = "",
    responses: Annotated[int, typer.Option(help="delphi: at most so many.")] = 2000,
    window: Annotated[int, typer.Option(help="delphi: tokens of a sequence.")] = 64,
    splits: Annotated[int, typer.Option(help="delphi: files the latents are split into.")] = 5,
    max_length: MaxLength = 4096,
    dtype: Dtype = None,
    quantization: Quantization = None,
    skip_bad: SkipBad = False,
) -> None:
    """Write what Neuronpedia imports, or the cache of activations that delphi reads."""
    from sarm.data import BadRecords
    from sarm.features import FeatureStore
    from sarm.features.delphi import export_delphi
    from sarm.features.neuronpedia import export_neuronpedia

    if layout == "neuronpedia":
        if database is None:
            raise InputError("features export: neuronpedia needs a feature database")
        with FeatureStore(database) as store:
            folder = export_neuronpedia(store, out, model_id=model_id, creator=creator)
        stdout.print(f"{folder}: written", soft_wrap=True)
    elif layout == "delphi":
        if model is None or not source:
            raise InputError("features export: delphi needs -m and --source")
        bad = BadRecords(skip=skip_bad)
        count = export_delphi(
            open_scorer(model, dtype, quantization, max_length),
            source,
            out,
            responses=responses,
            window=window,
            splits=splits,
            model_name=model_id,
            bad=bad,
        )
        stdout.print(f"{out}: {count} responses", soft_wrap=True)
        report_bad(bad)
    else:
        raise InputError(f"--format must be neuronpedia or delphi, got {layout!r}")


def _list(store, order: str, limit: int) -> None:
    from rich.table import Table

    from sarm.interpret.terminal import literal

    names = store.names()
    table = Table(
        "feature", "active in", "mean", "weight", "contribution", "contrast", "length", "markdown",
        "label", box=None,
    )  # fmt: skip
    for f in store.features(order, limit):
        rest = (f.contrast, f.length_corr, f.markdown_corr)
        table.add_row(
            str(f.id),
            f"{100 * f.frequency:.2f} %",
            f"{f.mean:.4f}",
            f"{f.weight:+.5f}",
            f"{f.contribution:+.5f}",
            *("" if value is None else f"{value:+.3f}" for value in rest),
            literal(names.get(f.id, "")),
        )
    stdout.print(table)
