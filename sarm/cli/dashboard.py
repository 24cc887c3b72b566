"""`sarm dashboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sarm.cli.app import app, stdout
from sarm.cli.options import (
    Cache,
    Dtype,
    MaxLength,
    Model,
    Quantization,
    Threads,
    open_scorer,
    use_threads,
)
from sarm.errors import InputError
from sarm.progress import bars, stderr


@app.command()
def dashboard(
    model: Model,
    features: Annotated[
        Path | None, typer.Option(help="Feature database, from `sarm features collect`.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Preferences, RM-Bench or RewardBench 2 whose rewards are steered."
        ),
    ] = None,
    profiles: Annotated[
        Path | None, typer.Option(help="Folder that profiles may be saved in.")
    ] = None,
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8001,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name by which browsers call the page, repeatable."),
    ] = None,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the token the page asks for.")
    ] = None,
    cache: Cache = None,
    max_length: MaxLength = 4096,
    dtype: Dtype = None,
    quantization: Quantization = None,
    threads: Threads = None,
) -> None:
    """A page on which rewards are seen, explained and steered; see docs/dashboard.md."""
    from sarm.dashboard.app import Dashboard
    from sarm.dashboard.sets import EvaluationSet, read_set
    from sarm.dashboard.views import Views
    from sarm.evaluation.profiles import latent_sets
    from sarm.features import FeatureStore
    from sarm.integrations.process import is_loopback, listen, serve, token_from
    from sarm.tokens import ConversationEncoder

    use_threads(threads)
    token = token_from(token_env)
    if cache is not None and not sets:
        raise InputError("dashboard: --cache holds states of a --set; there is none")
    suite = [read_set(source) for source in sets or []]
    store = FeatureStore(features) if features else None  # before a model takes seconds to load
    sock = listen(host, port)
    scorer = open_scorer(model, dtype, quantization, max_length)
    views = Views(scorer, model.resolve().name, store, profiles_dir=profiles)
    if suite:
        encoder = ConversationEncoder(scorer.tokenizer, scorer.max_length)
        with bars() as add:
            progress = add("backbone, tokens", None).to
            found = latent_sets(scorer.model, encoder, suite, cache=cache, progress=progress)
        views.sets += [EvaluationSet(scorer.model, one) for one in found]
    if token is None and not is_loopback(host):
        stderr.print(
            f"sarm: warning: {host} is not a loopback address and there is no --token-env: "
            "anyone who can reach the port can use this page",
            soft_wrap=True,
        )
    page = Dashboard(views, token=token, hosts=[*([host] if host else []), *(allow_host or [])])
    serve(page, sock, lambda line: stdout.print(line, soft_wrap=True))
