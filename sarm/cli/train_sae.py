"""`sarm train-sae`."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from sarm.cli.app import app, stdout
from sarm.cli.options import (
    Cache,
    Dtype,
    Out,
    Quantization,
    SkipBad,
    Threads,
    backbone_path,
    float_type,
    report_bad,
    use_threads,
)
from sarm.progress import bars


@app.command("train-sae")
def train_sae(
    backbone: Annotated[
        str, typer.Argument(help="Checkpoint directory, .gguf file, hub id, or smollm2.")
    ],
    text: Annotated[
        str,
        typer.Argument(
            help=".txt .jsonl .jsonl.gz .json .parquet, a folder, or hub:owner/name[:split]."
        ),
    ],
    out: Out,
    n_latents: Annotated[int | None, typer.Option(help="Default: 16 x d_model.")] = None,
    k: Annotated[int | None, typer.Option(help="Default: 3 d_model / 64.")] = None,
    layer: Annotated[str, typer.Option(help='Layers kept, or "middle".')] = "middle",
    activations: Annotated[
        str,
        typer.Option(
            help="token, sentence, turn-end (what a reward model scores, after each sentence), "
            "last (after the text), or a mixture in shares of states: token:1,turn-end:3."
        ),
    ] = "sentence",
    chat: Annotated[bool, typer.Option(help="Put each text into an assistant turn.")] = False,
    conversations: Annotated[
        list[str] | None,
        typer.Option(
            help="Also learn from the scored tokens of these: preference rows, `messages`, or "
            "`prompt` with `completion`. Mixed evenly with the text's states."
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of a document seen at once.")] = 1024,
    max_states: Annotated[int | None, typer.Option(help="Stop after so many states.")] = None,
    chunk_states: Annotated[
        int,
        typer.Option(
            help="States shuffled together: 4 d_model bytes of memory each, twice with --prefetch."
        ),
    ] = 131072,
    prefetch: Annotated[
        bool | None,
        typer.Option(
            help="Run the backbone on the next chunk while the SAE learns from one. Default: on a "
            "GPU. The result has the same bits."
        ),
    ] = None,
    passes: Annotated[int, typer.Option(help="Times each chunk of states is learnt from.")] = 1,
    batch_size: int = 1024,
    lr: Annotated[
        float | None, typer.Option(help="Default: 2e-3 / sqrt(n_latents / 2048).")
    ] = None,
    standardize: Annotated[bool, typer.Option(help="Per dimension; folded on saving.")] = True,
    pre_bias: Annotated[str, typer.Option(help="Starts at mean, median or zero.")] = "mean",
    k_start: Annotated[
        int | None, typer.Option(help="k falls from this over the first fifth of the steps.")
    ] = None,
    multi_topk: Annotated[bool, typer.Option(help="Add the loss at 4 k, weighted 1/8.")] = False,
    dead_latents: Annotated[
        str, typer.Option(help="How latents that stopped firing come back: auxk, resample, none.")
    ] = "auxk",
    dead_after: Annotated[
        int | None,
        typer.Option(help="States without firing. Default: 10 M, a 20th of a short run."),
    ] = None,
    k_aux: Annotated[int | None, typer.Option(help="Default: min(d_model / 2, 512).")] = None,
    clip: Annotated[float, typer.Option(help="Greatest gradient norm; 0: any.")] = 1.0,
    ema: Annotated[
        float, typer.Option(help="Decay of the average of the weights that is saved; 0: none.")
    ] = 0.999,
    optimizer: Annotated[str, typer.Option(help="adam, adam-bf16 or adam-8bit.")] = "adam",
    log: Annotated[
        str, typer.Option(help="Beside metrics.jsonl: tensorboard, wandb or none.")
    ] = "none",
    log_every: Annotated[int, typer.Option(help="Steps.")] = 10,
    shards: Annotated[
        int,
        typer.Option(
            help="Under torchrun: spread the latents over so many processes; the others of its "
            "processes are data parallel."
        ),
    ] = 1,
    text_key: Annotated[str, typer.Option(help="Field of the rows that holds the text.")] = "text",
    cache: Cache = None,
    seed: int = 0,
    dtype: Dtype = None,
    quantization: Quantization = None,
    threads: Threads = None,
    skip_bad: SkipBad = False,
) -> None:
    """Train a TopK SAE on a backbone's residual stream; resumes when it was killed."""
    from sarm.backbone import load_backbone, load_tokenizer
    from sarm.data import BadRecords, read_conversations, read_texts, usable_conversations
    from sarm.states import StateCache
    from sarm.training.distributed.world import World, own_device
    from sarm.training.sae import SaeTrainConfig, SaeTrainer

    use_threads(threads)
    own_device()
    backbone = backbone_path(backbone)
    model = load_backbone(backbone, layer, dtype=float_type(dtype), quantization=quantization)
    d_model = model.config.hidden_size
    config = SaeTrainConfig(
        n_latents=16 * d_model if n_latents is None else n_latents,
        k=max(1, 3 * d_model // 64) if k is None else k,
        activations=activations,
        context=context,
        chat=chat,
        max_states=max_states,
        chunk_states=chunk_states,
        passes=passes,
        batch_size=batch_size,
        lr=lr,
        standardize=standardize,
        pre_bias=pre_bias,
        k_start=k_start,
        multi_topk=multi_topk,
        dead_latents=dead_latents,
        dead_after=dead_after,
        k_aux=k_aux,
        clip=clip or None,
        ema=ema,
        optimizer=optimizer,
        seed=seed,
    )
    bad = BadRecords(skip=skip_bad)

    def texts():
        bad.count = 0  # the corpus is read more than once
        return (body for _, body in read_texts(text, bad, text_key))

    def turns():
        found = (turn for source in conversations or [] for turn in read_conversations(source, bad))
        return usable_conversations(found, trainer.maker.encoder, bad) if skip_bad else found

    with contextlib.ExitStack() as stack:
        world = stack.enter_context(World.joined(shards))
        states = None
        if cache:
            world.from_main(lambda: StateCache(cache, model).close())  # one process makes the file
            states = stack.enter_context(StateCache(cache, model))
        trainer = SaeTrainer(
            model,
            load_tokenizer(backbone),
            config,
            out,
            states,
            log=log,
            log_every=log_every,
            prefetch=prefetch,
            world=world,
        )
        add = stack.enter_context(bars())
        collect, learn = add("backbone, states", None), add("SAE, steps", None)

        def on_step(metrics: dict[str, float]) -> None:
            learn.to(metrics["step"], metrics["of"])
            if "fvu" in metrics:
                learn.note(f"FVU {metrics['fvu']:.4f}, dead {100 * metrics['dead']:.1f} %")

        report = trainer.run(
            texts,
            turns if conversations else None,
            on_survey=lambda corpus: collect.to(0, corpus.states),
            on_states=collect.advance,
            on_step=on_step,
        )
    if not world.main:
        return
    alive = ""
    if report.alive_scored is not None:
        alive = f"   alive at scored tokens {100 * report.alive_scored:.1f} %"
    stdout.print(
        f"{out}: {report.states} states from {report.tokens} tokens, {report.steps} steps, "
        f"{report.seconds:.0f} s\n"
        f"FVU {report.fvu:.4f} (around the mean)   normalised MSE {report.normalized_mse:.4f}   "
        f"dead {100 * report.dead:.1f} %{alive}",
        soft_wrap=True,
    )
    report_bad(bad)
