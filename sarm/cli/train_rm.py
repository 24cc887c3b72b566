"""`sarm train-rm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sarm.cli.app import app, stdout
from sarm.cli.options import (
    Cache,
    Dtype,
    MaxLength,
    Out,
    SkipBad,
    Threads,
    backbone_path,
    float_type,
    report_bad,
    use_threads,
)
from sarm.errors import InputError


@app.command("train-rm")
def train_rm(
    backbone: Annotated[str, typer.Argument(help="The backbone the SAE was trained on.")],
    sae: Annotated[
        Path, typer.Argument(help="SAE folder (train-sae), SARM, or an SAE of another library.")
    ],
    preferences: Annotated[str, typer.Argument(help="Preference file in one of TRL's formats.")],
    out: Out,
    mode: Annotated[
        str,
        typer.Option(
            help="head: solved on frozen states. End to end: 0 the head; 1 and the backbone; "
            "2 and the SAE, all with reconstruction; 3 the same, reconstruction for the SAE alone."
        ),
    ] = "head",
    layer: str = "middle",
    max_length: MaxLength = 4096,
    valid: Annotated[str | None, typer.Option(help="Held-out preference file.")] = None,
    margin: Annotated[
        bool | None, typer.Option(help="Use the column `margin` (default: if it is there).")
    ] = None,
    centre: Annotated[float, typer.Option(help="Weight of (chosen + rejected)^2.")] = 0.0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first so many pairs.")
    ] = None,
    l2: Annotated[
        float | None, typer.Option(help="Head: default is cross-validated over prompts.")
    ] = None,
    penalty: Annotated[
        str | None, typer.Option(help="Head: l2 (default), l1 or elastic-net; the latter a path.")
    ] = None,
    smallest_within: Annotated[
        float | None,
        typer.Option(
            help="Head, of a path: the fewest features within so many points of the best accuracy "
            "(cross-validated), instead of the lowest loss."
        ),
    ] = None,
    cache: Cache = None,
    epochs: Annotated[float | None, typer.Option(help="Modes 0-3: default 3.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Modes 0-3: pairs a step, 512.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Modes 0-3: pairs at once, 8.")] = None,
    lr: Annotated[float | None, typer.Option(help="Modes 0-3: default 4e-6.")] = None,
    lr_sae: Annotated[float | None, typer.Option(help="Modes 0-3: default --lr.")] = None,
    lr_head: Annotated[float | None, typer.Option(help="Modes 0-3: default --lr.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Modes 0-3: default 1e-3.")] = None,
    reconstruction: Annotated[
        str | None, typer.Option(help="Modes 2, 3: tokens of the last turn, or last: turn | last.")
    ] = None,
    reconstruction_weight: Annotated[
        float | None, typer.Option(help="Modes 2, 3: default 1.")
    ] = None,
    lora: Annotated[int | None, typer.Option(help="Modes 1-3: rank on the backbone.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Modes 0-3: bnb-int8, a frozen 8-bit backbone; see --lora.")
    ] = None,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing", help="Modes 1-3: less memory, more time.")
    ] = None,
    kept_tokens: Annotated[
        int | None,
        typer.Option(help="--checkpointing: only where a batch has more tokens than this."),
    ] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16", help="Modes 0-3: autocast.")] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Modes 0-3: steps between evaluations and checkpoints.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Modes 0-3: evaluations without a better one, then stop.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Modes 0-3: default 0.")] = None,
    log: Annotated[
        str | None, typer.Option(help="Modes 0-3: tensorboard, wandb, ... (default: none).")
    ] = None,
    dtype: Dtype = None,
    threads: Threads = None,
    skip_bad: SkipBad = False,
) -> None:
    """Train a reward model: its head in closed convex form, or (modes 0-3) end to end."""
    from sarm.training.commands import RewardJob, fit_command, train_command

    use_threads(threads)
    job = RewardJob(
        backbone=backbone_path(backbone),
        sae=sae,
        preferences=preferences,
        out=out,
        layer=layer,
        max_length=max_length,
        valid=valid,
        margin=margin,
        centre=centre,
        limit=limit,
        dtype=float_type(dtype),
        skip_bad=skip_bad,
    )
    for_head: dict[str, Any] = {
        "l2": l2,
        "penalty": penalty,
        "smallest_within": smallest_within,
        "cache": cache,
    }
    end_to_end: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "lr": lr,
        "lr_sae": lr_sae,
        "lr_head": lr_head,
        "weight_decay": weight_decay,
        "reconstruction": reconstruction,
        "reconstruction_weight": reconstruction_weight,
        "lora": lora,
        "quantization": quantization,
        "checkpointing": checkpointing,
        "kept_tokens": kept_tokens,
        "bf16": bf16,
        "eval_every": eval_every,
        "patience": patience,
        "seed": seed,
        "log": log,
    }
    mine, others = (for_head, end_to_end) if mode == "head" else (end_to_end, for_head)
    for name, value in others.items():
        if value is not None:
            where = "modes 0 to 3" if mode == "head" else "--mode head"
            raise InputError(f"--{name.replace('_', '-')} belongs to {where}, got --mode {mode}")
    given = {name: value for name, value in mine.items() if value is not None}
    bad = (
        fit_command(job, stdout, **given)
        if mode == "head"
        else train_command(job, mode, stdout, **given)
    )
    report_bad(bad)
