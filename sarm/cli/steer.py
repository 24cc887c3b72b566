"""`sarm steer`, `sarm steer find` and `sarm steer eval`; docs/steering.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sarm.cli.app import app, stdout
from sarm.cli.options import (
    Cache,
    Dtype,
    MaxLength,
    Model,
    Out,
    Quantization,
    float_type,
)
from sarm.errors import InputError
from sarm.progress import bars, stderr

group = typer.Typer()
app.add_typer(group, name="steer")

Sources = Annotated[list[str] | None, typer.Option()]
Labels = Annotated[
    Path | None, typer.Option("--features", help="Feature database that labels and tags mean.")
]


@group.callback(invoke_without_command=True)
def steer(
    context: typer.Context,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="SARM checkpoint directory.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The steered checkpoint.")] = None,
    feature: Annotated[
        list[str] | None, typer.Option("--feature", "-f", help="INDEX=FACTOR, repeatable.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", "-p", help="YAML profile, see docs/steering.md.")
    ] = None,
    features: Labels = None,
) -> None:
    """Write a steered checkpoint, or find and judge what to steer (`find`, `eval`)."""
    if context.invoked_subcommand:
        if model or out or feature or profile or features:
            raise typer.BadParameter(f"options belong after `{context.invoked_subcommand}`")
        return
    for value, name in ((model, "--model"), (out, "--out"), (feature or profile, "--feature")):
        if not value:
            raise typer.BadParameter(f"missing option {name}")
    if feature and profile:
        raise typer.BadParameter("pass --feature or --profile, not both")
    from sarm.scorer import SARMScorer

    assert model is not None
    assert out is not None
    if feature:
        factors = _factors(feature)
        SARMScorer.from_pretrained(model).steer(factors).save_pretrained(out)
        stdout.print(f"{out}: {len(factors)} feature weights changed", soft_wrap=True)
        return
    assert profile is not None
    scorer = SARMScorer.from_pretrained(model)
    read = _read_profile(profile, features, scorer.model)
    scorer.steer(read).save_pretrained(out)
    kept = "in head weights" if read.linear else "in head weights and config.json"
    if read.when:
        kept = "in config.json, behind its gate"
    stdout.print(f"{out}: {len(read.changes)} features changed, {kept}", soft_wrap=True)


def _factors(items: list[str]) -> dict[int, float]:
    factors: dict[int, float] = {}
    for item in items:
        index, _, factor = item.partition("=")
        try:
            factors[int(index)] = float(factor)
        except ValueError:
            raise InputError(f"--feature must be INDEX=FACTOR, got {item!r}") from None
    return factors


def _read_profile(path: Path, features: Path | None, model):
    from sarm.steering import FeatureNames, read_profile

    names = FeatureNames.of_database(features, model) if features else None
    return read_profile(path, names=names, model=model)


@group.command()
def find(
    model: Model,
    out: Out,
    rm_bench: Sources = None,
    preferences: Sources = None,
    reward_bench_2: Sources = None,
    off_rm_bench: Sources = None,
    off_preferences: Sources = None,
    off_reward_bench_2: Sources = None,
    tune_rm_bench: Sources = None,
    tune_preferences: Sources = None,
    tune_reward_bench_2: Sources = None,
    method: Annotated[
        str, typer.Option(help="contrast (published), bounded or gate; see docs/steering.md.")
    ] = "contrast",
    top: Annotated[int, typer.Option(min=1, help="contrast: features multiplied at most.")] = 10,
    factor: Annotated[float, typer.Option(help="contrast: the multiplier.")] = 2.0,
    stability: Annotated[
        float, typer.Option(help="contrast: share of resamples that must select a feature.")
    ] = 0.8,
    shift: Annotated[
        float,
        typer.Option(
            help="bounded, gate: rise of the domain's chosen answers (--tune-...), in sd."
        ),
    ] = 1.0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="bounded, gate: features used at most.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The profile's (default: the file's).")] = None,
    table: Annotated[
        Path | None, typer.Option(help="CSV of every feature's score and stability.")
    ] = None,
    max_length: MaxLength = 4096,
    cache: Cache = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
) -> None:
    """Find the features of a domain and write a profile that steers it.

    The domain is given by --rm-bench, --preferences or --reward-bench-2, what must stay as it is by
    the --off- options; --tune- options give other answers of the domain, which set a gate's
    strength. FILE#1/2 is half of a file's prompts, FILE#source=rmb/* a field's value.
    """
    from sarm.evaluation.profiles import read_latents
    from sarm.evaluation.sources import read_suite
    from sarm.steering import write_profile
    from sarm.steering.find import domain_profile, merged, write_contrast

    if method not in ("contrast", "bounded", "gate"):
        raise InputError(f"--method must be contrast, bounded or gate, got {method!r}")
    target = read_suite(preferences, rm_bench, reward_bench_2)
    off = read_suite(off_preferences, off_rm_bench, off_reward_bench_2)
    tune = read_suite(tune_preferences, tune_rm_bench, tune_reward_bench_2)
    if not target:
        raise InputError("steer find: pass --rm-bench, --preferences or --reward-bench-2")
    if tune and method != "gate":
        raise InputError(f"steer find: --method {method} has no strength to set by --tune-...")
    if method != "contrast" and not off:
        raise InputError(f"steer find: --method {method} needs an off-target set (--off-...)")
    with bars() as add:
        loaded, sets = read_latents(
            model,
            [*target, *off, *tune],
            max_length=max_length,
            cache=cache,
            dtype=float_type(dtype),
            quantization=quantization,
            progress=add("backbone, tokens", None).to,
        )
    after = len(target) + len(off)
    found = domain_profile(
        loaded,
        merged(sets[: len(target)]),
        sets[len(target) : after],
        tune=merged(sets[after:]) if tune else None,
        method=method,
        top=top,
        factor=factor,
        stability=stability,
        shift=shift,
        limit=limit,
        name=name or out.stem,
    )
    if table:
        write_contrast(found.contrast, table)
    write_profile(found.profile, out)
    rows = Table("feature", "contrast", "95 %", "rank", "95 %", f"in top {top}", "weight", box=None)
    weight = loaded.score.weight[0].tolist()
    c = found.contrast
    for j in c.score.argsort()[::-1][: min(top, 20)]:
        rows.add_row(
            str(j),
            f"{c.score[j]:.3f}",
            f"{c.low[j]:.3f} to {c.high[j]:.3f}",
            str(c.rank[j]),
            f"{c.rank_low[j]:.0f} to {c.rank_high[j]:.0f}",
            f"{100 * c.selected[j]:.0f} %",
            f"{weight[j]:+.4f}",
        )
    stdout.print(rows)
    stdout.print(f"rank correlation of a resample with all prompts: {c.agreement:.3f}")
    for line in found.notes:
        stdout.print(line, soft_wrap=True, markup=False)
    if found.warning:
        stderr.print(found.warning, markup=False, soft_wrap=True)
    gate = found.profile.when
    what = (
        f"gate over {len(gate.weights)} features"
        if gate
        else (f"{len(found.profile.changes)} features changed")
    )
    stdout.print(f"{out}: {what}", soft_wrap=True)


@group.command("eval")
def evaluate(
    model: Model,
    profile: Annotated[
        list[Path], typer.Option("--profile", "-p", help="YAML profile; repeat to compare.")
    ],
    rm_bench: Sources = None,
    preferences: Sources = None,
    reward_bench_2: Sources = None,
    off_rm_bench: Sources = None,
    off_preferences: Sources = None,
    off_reward_bench_2: Sources = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for JSON, Markdown and a plot.")
    ] = None,
    features: Labels = None,
    cross: Annotated[
        bool,
        typer.Option(
            "--cross",
            help="The i-th of N profiles was found without FILE#i/N: it judges that part.",
        ),
    ] = False,
    max_length: MaxLength = 4096,
    cache: Cache = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
) -> None:
    """The shift on a target set and off it, and rankings before and after, with intervals."""
    import sarm
    from sarm.evaluation.profiles import read_latents
    from sarm.evaluation.report import cells, headings
    from sarm.evaluation.sources import read_suite
    from sarm.evaluation.steering import evaluate_steering
    from sarm.evaluation.steering_report import HEADINGS, shift_cells, write_steering_report
    from sarm.steering import Heads

    target = read_suite(preferences, rm_bench, reward_bench_2)
    off = read_suite(off_preferences, off_rm_bench, off_reward_bench_2)
    if not target:
        raise InputError(
            "steer eval: the target set is empty; pass --rm-bench, --preferences or "
            "--reward-bench-2"
        )
    with bars() as add:
        loaded, sets = read_latents(
            model,
            [*target, *off],
            max_length=max_length,
            cache=cache,
            dtype=float_type(dtype),
            quantization=quantization,
            progress=add("backbone, tokens", None).to,
        )
    profiles = [_read_profile(path, features, loaded) for path in profile]
    names = [p.name or path.stem for p, path in zip(profiles, profile, strict=True)]
    heads = Heads.of(loaded, [{}, *profiles])
    result = evaluate_steering(heads, names, sets[: len(target)], sets[len(target) :], cross=cross)
    for titles, lines in (
        (HEADINGS, [shift_cells(shift) for shift in result.shifts]),
        (headings(result.accuracies), [cells(one) for one in result.accuracies]),
    ):
        rows = Table(*titles, box=None)
        for line in lines:
            rows.add_row(*line)
        stdout.print(rows)
        stdout.print()
    if out:
        settings = {
            "sarm": sarm.__version__,
            "max_length": max_length,
            "dtype": dtype or "default",
            "quantization": quantization or "as saved",
        }
        write_steering_report(result, settings, out)
