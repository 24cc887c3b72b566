"""`sarm audit`: style, debias, drift, preferences; docs/steering.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from sarm.cli.app import app, stdout
from sarm.cli.options import Cache, Dtype, MaxLength, Model, Out, Quantization, float_type
from sarm.errors import InputError
from sarm.progress import bars

group = typer.Typer(
    no_args_is_help=True, help="What a reward model should not reward: style, drift, wrong labels."
)
app.add_typer(group, name="audit")

Sources = Annotated[list[str] | None, typer.Option()]
Maybe = Annotated[Path | None, typer.Option("--out", "-o", help="Where the result is written.")]


def _latents(model: Path, suite, max_length: int, cache, dtype, quantization):
    from sarm.evaluation.profiles import read_latents

    with bars() as add:
        return read_latents(
            model,
            suite,
            max_length=max_length,
            cache=cache,
            dtype=float_type(dtype),
            quantization=quantization,
            progress=add("backbone, tokens", None).to,
        )


def _head(model) -> np.ndarray:
    return model.score.weight[0].detach().double().cpu().numpy()


@group.command()
def style(
    model: Model,
    rm_bench: Sources = None,
    preferences: Annotated[
        list[str] | None, typer.Option(help="Pairs whose chosen answers are perturbed.")
    ] = None,
    styles: Annotated[
        str, typer.Option(help="Perturbations: markdown, length, praise, agreement, position.")
    ] = "markdown,length,praise,agreement,position",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="CSV of every feature and style.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Features listed for each style.")] = 10,
    max_length: MaxLength = 4096,
    cache: Cache = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
) -> None:
    """Features that follow style: from RM-Bench's triples, or from perturbed answers."""
    from sarm.audit.perturb import PERTURBATIONS
    from sarm.audit.report import write_style
    from sarm.audit.style import perturbed, perturbed_twins, style_scores, triple_twins
    from sarm.evaluation.sources import read_suite

    wanted = [name.strip() for name in styles.split(",")]
    unknown = next((name for name in wanted if name not in PERTURBATIONS), None)
    if unknown is not None:
        raise InputError(f"--styles: unknown {unknown!r}; known are {', '.join(PERTURBATIONS)}")
    triples = read_suite(rm_bench=rm_bench)
    other = [perturbed(one, wanted) for one in read_suite(preferences)]
    if not triples and not other:
        raise InputError("audit style: pass --rm-bench or --preferences")
    loaded, sets = _latents(model, [*triples, *other], max_length, cache, dtype, quantization)
    found = []
    for i, one in enumerate(sets):
        twins = triple_twins(one) if i < len(triples) else perturbed_twins(one, wanted)
        for each in twins:
            scores = style_scores(one, each, _head(loaded))
            found.append(scores)
            _print_style(one.benchmark.name, scores, top)
    if out:
        write_style(found, out)


def _print_style(benchmark: str, scores, top: int) -> None:
    total = scores.total
    stdout.print(
        f"{scores.style}, {benchmark}: {scores.twins:,} twins, reward {total.value:+.3f} "
        f"[{total.low:+.3f}, {total.high:+.3f}], {scores.clear.sum():,} features follow it",
        markup=False,
        soft_wrap=True,
    )
    rows = Table("feature", "effect size", "95 %", "reward", "95 %", box=None)
    for j in np.argsort(-np.abs(scores.reward), kind="stable")[:top]:
        rows.add_row(
            str(j),
            f"{scores.effect[j]:+.2f}",
            f"{scores.low[j]:+.2f} to {scores.high[j]:+.2f}",
            f"{scores.reward[j]:+.4f}",
            f"{scores.reward_low[j]:+.4f} to {scores.reward_high[j]:+.4f}",
        )
    stdout.print(rows)


@group.command()
def debias(
    model: Model,
    rm_bench: Annotated[list[str], typer.Option(help="RM-Bench.")],
    out: Out,
    features: Annotated[int, typer.Option(min=1, help="Features that may change.")] = 500,
    high: Annotated[float, typer.Option(min=1, help="Largest multiplier; 1: suppress only.")] = 1.0,
    max_drop: Annotated[
        float, typer.Option(help="Points that easy and normal may each lose, out of fold.")
    ] = 1.0,
    margin: Annotated[
        float, typer.Option(min=0, help="Standard errors that the loss must stay below that.")
    ] = 1.0,
    splits: Annotated[
        int, typer.Option(min=0, help="Random splits on which all of it is repeated and judged.")
    ] = 0,
    max_length: MaxLength = 4096,
    cache: Cache = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
) -> None:
    """Suppress style features: chosen on half of the prompts, judged on the other half."""
    from sarm.audit.debias import Spread, repeated, trade
    from sarm.audit.report import (
        SPREAD_HEADINGS,
        TRADE_HEADINGS,
        spread_cells,
        spread_text,
        trade_cells,
        write_trade,
    )
    from sarm.evaluation import benchmarks
    from sarm.evaluation.sources import split_prompts
    from sarm.steering.files import features_fingerprint

    whole = benchmarks.rm_bench(*rm_bench)
    suite = [*split_prompts(whole, 2), whole]
    loaded, (fit, held, both) = _latents(model, suite, max_length, cache, dtype, quantization)
    weight, most = loaded.score.weight[:1].detach(), max_drop / 100
    options: dict = {"features": features, "high": high, "max_drop": most, "margin": margin}
    found = trade(fit, held, weight, **options)
    rows = Table(*TRADE_HEADINGS, box=None)
    rows.add_row(*trade_cells(None, found.held, False))
    for point in found.points:
        rows.add_row(*trade_cells(point, found.held, point is found.chosen))
    stdout.print(rows)
    if found.chosen is None:
        stdout.print("no point gains on hard and surely keeps the others within --max-drop")
    again = repeated(both, weight, splits, **options)
    if again:
        spread = Spread.of(again, most)
        rows = Table(*SPREAD_HEADINGS, box=None)
        for cells in spread_cells(spread):
            rows.add_row(*cells)
        stdout.print(rows)
        stdout.print(spread_text(spread, most), soft_wrap=True, markup=False)
    mine = features_fingerprint(loaded)
    write_trade(found, out, max_drop=most, splits=again, model=mine)


@group.command()
def drift(
    model: Model,
    reference: Annotated[Path, typer.Option(help="Reference profile (.safetensors).")],
    preferences: Annotated[
        str | None, typer.Option(help="Known data: writes the reference from its answers.")
    ] = None,
    batch: Annotated[
        Path | None, typer.Argument(help="Rows as for `score`: compared with the reference.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="False discovery rate, and level.")] = 0.01,
    out: Maybe = None,
    max_length: MaxLength = 4096,
    cache: Cache = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
) -> None:
    """Flag likely reward hacking: a batch's features against those of known data."""
    from sarm.audit.drift import Reference, measure_drift
    from sarm.audit.report import drift_fields
    from sarm.evaluation.sources import read_suite
    from sarm.steering.files import features_fingerprint

    if (preferences is None) == (batch is None):
        raise InputError("audit drift: pass --preferences to write the reference, or a batch")
    suite = read_suite([preferences]) if preferences else [_batch(batch)]
    loaded, (one,) = _latents(model, suite, max_length, cache, dtype, quantization)
    mine = features_fingerprint(loaded)
    if preferences:
        made = Reference.of(one.matrix, one.groups, _head(loaded), mine)
        made.save(reference)
        stdout.print(
            f"{reference}: {made.rows:,} answers, {made.sample.shape[0]:,} kept for the null",
            soft_wrap=True,
        )
        return
    found = measure_drift(Reference.load(reference, mine), one.matrix, one.groups, alpha=alpha)
    fields = drift_fields(found)
    verdict = "like the reference"
    if found.drifted:
        verdict = (
            "LIKELY REWARD HACKING" if found.suspicious else "drifted, but not rewarded for it"
        )
    stdout.print(
        f"{batch}: {verdict}. distance {found.distance:.2f}, threshold {found.threshold:.2f} "
        f"(p {found.p:.3f}); reward {found.reward:+.3f} (p {found.reward_p:.3f}); "
        f"{found.significant.sum():,} features differ",
        soft_wrap=True,
        markup=False,
    )
    rows = Table("feature", "z", "earned", box=None)
    for row in fields["features"]:
        rows.add_row(str(row["feature"]), f"{row['z']:+.1f}", f"{row['earned']:+.4f}")
    stdout.print(rows)
    if out:
        from sarm.checkpoint import replace_file

        with replace_file(out) as file:
            file.write(json.dumps(fields, indent=2) + "\n")


def _batch(path):
    """A file of responses as a benchmark without a rule."""
    from sarm.data import read_conversations
    from sarm.evaluation.metrics import Benchmark, Item

    items = [
        Item([turns], 1, where, json.dumps(turns[:-1])) for where, turns in read_conversations(path)
    ]
    if not items:
        raise InputError(f"{path}: no items")
    return Benchmark("batch", items, lambda items, scores: [{} for _ in items], (), str(path))


@group.command()
def preferences(
    model: Model,
    source: Annotated[str, typer.Argument(help="Preference pairs in one of TRL's formats.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON lines of the pairs, worst first.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Pairs listed.")] = 20,
    folds: Annotated[int, typer.Option(min=2)] = 5,
    max_length: MaxLength = 4096,
    cache: Cache = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
) -> None:
    """Pairs whose label contradicts the features, by out-of-fold margins."""
    from sarm.audit.preferences import audit_preferences
    from sarm.audit.report import write_suspects
    from sarm.evaluation.sources import read_suite

    _, (one,) = _latents(model, read_suite([source]), max_length, cache, dtype, quantization)
    found = audit_preferences(one, folds=folds)
    stdout.print(
        f"{source}: {len(found.suspects):,} of {len(found.margins):,} labels contradict the "
        f"features (out-of-fold accuracy {100 * found.accuracy:.1f} %, l2 {found.l2:g})",
        soft_wrap=True,
        markup=False,
    )
    rows = Table("pair", "margin", "probability", "features against it", box=None)
    for suspect in found.suspects[:top]:
        against = ", ".join(f"{j} ({part:+.2f})" for j, part in suspect.features)
        rows.add_row(suspect.where, f"{suspect.margin:+.2f}", f"{suspect.probability:.3f}", against)
    stdout.print(rows)
    if out:
        write_suspects(found, out)
