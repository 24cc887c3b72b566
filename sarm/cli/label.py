"""`sarm features label`."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sarm.cli.app import stdout
from sarm.cli.features import Database, features
from sarm.errors import InputError
from sarm.progress import bars, stderr

if TYPE_CHECKING:
    from sarm.features import FeatureStore
    from sarm.labels.contexts import Sampling
    from sarm.labels.endpoint import Usage
    from sarm.labels.run import Report

SHOWN_FAILURES = 5


@features.command()
def label(
    database: Database,
    model: Annotated[str | None, typer.Option(help="Language model, as the endpoint calls it.")] = (
        None
    ),
    base_url: Annotated[
        str, typer.Option(help='OpenAI-compatible endpoint, up to and with "/v1".')
    ] = "https://api.openai.com/v1",
    key_env: Annotated[
        str, typer.Option(help="Environment variable with the key; there is no other way in.")
    ] = "OPENAI_API_KEY",
    offline: Annotated[
        bool, typer.Option("--offline", help="Names by word statistics; no model, no network.")
    ] = False,
    only: Annotated[
        str | None, typer.Option("--features", help="Numbers, separated by commas.")
    ] = None,
    order: Annotated[str, typer.Option(help="Which features come first.")] = "contribution",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many features.")] = None,
    contexts: Annotated[int, typer.Option(min=1, help="Shown to the model for a feature.")] = 40,
    held_out: Annotated[
        int, typer.Option(min=0, help="Contexts of either class that score a label; 0: no score.")
    ] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Contexts judged in one request.")] = 10,
    threshold: Annotated[float, typer.Option(min=0, help="What counts as active.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds for one try.")] = 60.0,
    retries: Annotated[int, typer.Option(min=0, help="Further tries.")] = 5,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, thoughts included.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Of the model and of sampled contexts.")] = 0,
    price_in: Annotated[float | None, typer.Option(min=0, help="Per million tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(min=0, help="Per million tokens.")] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Also what has a label.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also what could not be labelled before.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The estimate only.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before spending.")] = False,
) -> None:
    """Explain features and score how well each explanation predicts; see docs/labels.md.

    Run again, it goes on with what has no label.
    """
    from sarm.features import FeatureStore
    from sarm.labels.contexts import Sampling

    if not database.is_file():
        raise FileNotFoundError(2, "no such feature database", str(database))
    sampling = Sampling(contexts, held_out, threshold, seed)
    with FeatureStore(database, "rw") as store:
        chosen = _chosen(store, only, order, limit if offline else None)
        if offline:
            _offline(store, chosen, sampling, dry_run)
            return
        if model is None:
            raise InputError("features label: pass --model, or --offline for word statistics")
        from sarm.labels.endpoint import Endpoint, Settings, key_from
        from sarm.labels.estimate import estimate
        from sarm.labels.records import Records
        from sarm.labels.run import Labeler, pending

        settings = Settings(model, base_url, concurrency, timeout, retries, max_tokens, seed)
        key = None if dry_run else key_from(key_env, base_url)
        if key and settings.exposes_key:
            stderr.print(f"sarm: warning: {key_env} goes unencrypted to {base_url}", soft_wrap=True)
        records = Records(store, model)
        todo = pending(records, chosen, redo=redo, retry_failed=retry_failed)[:limit]
        expected = estimate(store, todo, sampling, batch, max_tokens)
        line = (
            f"{len(todo)} of {len(chosen)} features to label: about {expected.requests:,} requests,"
            f" {expected.tokens_in:,} tokens in, {expected.tokens_out:,} out (at most "
            f"{expected.most_out:,})"
        )
        if price_in is not None or price_out is not None:
            low, high = expected.cost(price_in or 0.0, price_out or 0.0)
            line += f"; cost about {low:.2f}, at most {high:.2f} without repeats"
        stdout.print(line, soft_wrap=True, markup=False)
        if dry_run or not todo:
            return
        if not yes:
            _confirm()

        async def run(progress) -> tuple[Report, Usage]:
            async with Endpoint(settings, key) as endpoint:
                labeler = Labeler(store, endpoint, sampling, batch=batch, redo=redo)
                return await labeler.run(todo, progress), endpoint.usage

        with bars() as add:
            report, usage = asyncio.run(run(add("features", len(todo)).advance))
        _examples(store, model, todo)
        _summary(report, usage, price_in, price_out)
    if report.stopped:
        raise InputError(f"stopped, finished labels are kept: {report.stopped}")
    if report.left:
        raise typer.Exit(1)


def _chosen(store: FeatureStore, only: str | None, order: str, limit: int | None) -> list[int]:
    if only is None:
        return [f.id for f in store.features(order, limit)]
    try:
        numbers = [int(part) for part in only.split(",")]
    except ValueError:
        raise InputError(f"--features must be numbers like 1,2,3, got {only!r}") from None
    return [store.feature(number).id for number in numbers][:limit]


def _offline(store: FeatureStore, chosen: list[int], sampling: Sampling, dry_run: bool) -> None:
    from sarm.labels.offline import METHOD, label_offline

    if dry_run:
        stdout.print(f"{len(chosen)} features to label by statistics, at no cost")
        return
    with bars() as add:
        records, failed = label_offline(store, chosen, sampling, add("features", None).advance)
    _examples(store, METHOD, chosen)
    stdout.print(
        f"{records.labelled} features labelled by statistics, {len(failed)} without a word"
    )
    _reasons(failed)


def _examples(store: FeatureStore, method: str, features: list[int], count: int = 10) -> None:
    """The first few labels; what they say is data, not markup."""
    from sarm.interpret.terminal import literal

    table = Table("feature", "label", "score", "detection", "95 %", box=None)
    table.columns[1].max_width = 70
    labels = {label.feature: label for label in store.labels(method=method)}
    for feature in [f for f in features if f in labels][:count]:
        found = labels[feature]
        interval = (found.details.get("detection") or {}).get("interval")
        table.add_row(
            str(feature),
            literal(found.label),
            "" if found.score is None else f"{found.score:.0f}",
            "" if found.detection is None else f"{found.detection:.2f}",
            f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "",
        )
    if table.row_count:
        stdout.print(table)


def _summary(report: Report, usage: Usage, price_in: float | None, price_out: float | None) -> None:
    line = (
        f"{report.labelled} labelled, {len(report.failed)} failed, {len(report.left)} left for "
        f"another run, {report.elsewhere} done by another one; {usage.requests:,} requests "
        f"({usage.retries} retries, {usage.unreadable} unreadable answers), {usage.tokens_in:,} "
        f"tokens in, {usage.tokens_out:,} out"
    )
    if price_in is not None or price_out is not None:
        cost = usage.tokens_in * (price_in or 0.0) + usage.tokens_out * (price_out or 0.0)
        line += f"; cost {cost / 1e6:.2f}"
    stdout.print(line, soft_wrap=True, markup=False)
    _reasons(report.failed | report.left)


def _reasons(failed: dict[int, str]) -> None:
    for feature, reason in list(failed.items())[:SHOWN_FAILURES]:
        stderr.print(f"feature {feature}: {reason}", markup=False, soft_wrap=True)
    if len(failed) > SHOWN_FAILURES:
        stderr.print(f"and {len(failed) - SHOWN_FAILURES} more")


def _confirm() -> None:
    if not sys.stdin.isatty():
        raise InputError("features label: asks before it spends; pass --yes")
    typer.confirm("Go on?", abort=True)
