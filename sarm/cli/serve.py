"""`sarm serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from sarm.cli.app import app, stdout
from sarm.cli.options import Dtype, MaxLength, Model, Quantization, Threads, float_type, use_threads
from sarm.progress import stderr


@app.command()
def serve(
    model: Model,
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Of the model in requests (default: its folder's).")
    ] = None,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the bearer token.")
    ] = None,
    max_wait_ms: Annotated[float, typer.Option(help="A request waits so long for company.")] = 10,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Default: by device.")] = None,
    max_batch_size: int = 512,
    queue_limit: Annotated[
        int, typer.Option(help="Sequences accepted and not yet answered; more get 429.")
    ] = 4096,
    max_body_mib: float = 16,
    timeout: Annotated[float, typer.Option(help="Seconds; later a request gets 503.")] = 150,
    prefix_cache_mib: Annotated[
        float, typer.Option(min=0, help="Keys and values kept across requests; 0: none.")
    ] = 512,
    max_length: MaxLength = 4096,
    dtype: Dtype = None,
    quantization: Quantization = None,
    threads: Threads = None,
) -> None:
    """Rewards over HTTP for OpenRLHF, verl, TRL and vLLM clients; see docs/serving.md."""
    from sarm.integrations.process import is_loopback, listen, token_from
    from sarm.integrations.process import serve as run
    from sarm.integrations.server import ServeConfig, Service
    from sarm.scorer import SARMScorer

    use_threads(threads)
    floats = float_type(dtype)
    config = ServeConfig(
        max_wait_ms, max_batch_tokens, max_batch_size, queue_limit, max_body_mib, timeout
    )
    token = token_from(token_env)
    service = Service(
        lambda: SARMScorer.from_pretrained(
            model,
            dtype=floats,
            quantization=quantization,
            max_length=max_length,
            prefix_cache_mib=prefix_cache_mib,
            decoder=False,
        ),
        name or model.resolve().name,
        config,
        token=token,
    )
    sock = listen(host, port)
    if token is None and not is_loopback(host):
        stderr.print(
            f"sarm: warning: {host} is not a loopback address and there is no --token-env: "
            "anyone who can reach the port can use this server",
            soft_wrap=True,
        )
    run(service, sock, lambda line: stdout.print(line, soft_wrap=True))
