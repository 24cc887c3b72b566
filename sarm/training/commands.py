"""What `sarm train-rm` does, in both of its forms: read, train, save, say what came out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sarm.backbone import load_backbone, load_tokenizer
from sarm.checkpoint import load_sae
from sarm.data import BadRecords, PreferencePair, read_preferences
from sarm.errors import InputError
from sarm.progress import bars
from sarm.sae import TopKSAE
from sarm.states import StateCache
from sarm.tokens import ConversationEncoder, usable_length
from sarm.training.collate import PairDataset
from sarm.training.distributed.head import extract_together
from sarm.training.distributed.world import leaving_group, naming_lost_ranks, own_device
from sarm.training.end_to_end import save_pairs, train_pairs
from sarm.training.reward import save_reward, train_reward, usable_pairs
from sarm.training.sae import check_origin
from sarm.training.trainer import PairTrainConfig


@dataclass(frozen=True)
class RewardJob:
    """What both forms of training take."""

    backbone: str
    sae: Path
    preferences: str
    out: Path
    layer: str = "middle"
    max_length: int = 4096
    valid: str | None = None
    margin: bool | None = None
    centre: float = 0.0
    limit: int | None = None
    dtype: torch.dtype | None = None
    skip_bad: bool = False

    def pairs(self, source: str, bad: BadRecords) -> list[PreferencePair]:
        """The pairs of a file, at most `limit` of the training file."""
        limit = self.limit if source == self.preferences else None
        found = list(itertools.islice(read_preferences(source, bad), limit))
        if not found:
            raise InputError(f"{source}: no preference pairs")
        return found


def fit_command(
    job: RewardJob,
    console: Console,
    *,
    l2: float | None = None,
    penalty: str = "l2",
    smallest_within: float | None = None,
    cache: Path | None = None,
) -> BadRecords:
    """`--mode head`: states cached, convex problem solved to its optimum.

    Of several processes each runs its share of the conversations; rank 0 solves, the others end.
    """
    own_device()
    dictionary, bad = load_sae(job.sae), BadRecords(skip=job.skip_bad)
    pairs = job.pairs(job.preferences, bad)
    held = job.pairs(job.valid, bad) if job.valid else None
    model = load_backbone(job.backbone, job.layer, dtype=job.dtype)
    tokenizer = load_tokenizer(job.backbone)
    check_origin(job.sae, model)
    encoder = ConversationEncoder(tokenizer, usable_length(model.config, job.max_length))
    if job.skip_bad:
        pairs = usable_pairs(pairs, encoder, bad)
        held = usable_pairs(held, encoder, bad) if held else None
    path = cache or job.out / "states.sqlite"
    if not extract_together([*pairs, *(held or [])], encoder, path, model):
        return bad
    with StateCache(path, model) as states, bars() as add:
        bar = add("backbone, tokens", None)
        fit = train_reward(
            model,
            dictionary,
            pairs,
            encoder,
            states,
            l2=l2,
            penalty=penalty,
            smallest=smallest_within,
            margin=job.margin,
            centre=job.centre,
            valid=held,
            progress=bar.to,
        )
    save_reward(
        fit, tokenizer, job.out, {"preferences": job.preferences, "max_length": encoder.max_length}
    )
    console.print(
        f"{job.out}: {fit.pairs} pairs ({fit.equal} equal left out, {fit.truncated} "
        f"conversations cut to {encoder.max_length} tokens)",
        soft_wrap=True,
    )
    table = Table(
        "", "train accuracy", "train loss", "CV loss", "l2", "gradient", "iterations", "s", box=None
    )
    for name, part in (("SARM head", fit.head), ("dense probe", fit.probe)):
        table.add_row(
            name,
            f"{100 * part.accuracy:.1f} %",
            f"{part.loss:.4f}",
            f"{part.cv[part.l2]:.4f}" if part.cv else "-",
            f"{part.l2:.2g}",
            f"{part.gradient_norm:.1e}",
            str(part.iterations),
            f"{part.seconds:.1f}",
        )
    console.print(table)
    for line in fit.lines():
        console.print(line, soft_wrap=True)
    return bad


def _trainable(path) -> TopKSAE:
    """An SAE that can be trained with the backbone; a fixed one (JumpReLU) suits --mode head."""
    sae = load_sae(path)
    if not isinstance(sae, TopKSAE):
        raise InputError(
            f"{path}: modes 0 to 3 train a TopK SAE, this is {sae.activation}; use --mode head"
        )
    return sae


def train_command(
    job: RewardJob,
    mode: str,
    console: Console,
    *,
    quantization: str | None = None,
    log: str = "none",
    **settings: Any,
) -> BadRecords:
    """`--mode 0` to `3`: end to end, with the Trainer."""
    if mode not in ("0", "1", "2", "3"):
        raise InputError(f"--mode must be head, 0, 1, 2 or 3, got {mode!r}")
    config = PairTrainConfig(int(mode), centre=job.centre, **settings)
    if quantization and config.mode > 0 and config.lora is None:
        raise InputError("an 8-bit backbone learns by LoRA only: give --lora RANK, or --mode 0")
    # plain weights learn in fp32: steps of 1e-6 would be lost to bf16's rounding
    learns = config.mode > 0 and config.lora is None
    dtype = torch.float32 if learns and job.dtype is None else job.dtype

    own_device()
    dictionary, bad = _trainable(job.sae), BadRecords(skip=job.skip_bad)
    head = head_of(job.sae)
    pairs = job.pairs(job.preferences, bad)
    held = job.pairs(job.valid, bad) if job.valid else None

    def backbone(quantization: str | None = None) -> Any:
        return load_backbone(job.backbone, job.layer, dtype=dtype, quantization=quantization)

    model = backbone(quantization)
    tokenizer = load_tokenizer(job.backbone)
    check_origin(job.sae, model)
    encoder = ConversationEncoder(tokenizer, usable_length(model.config, job.max_length))
    turns = config.mode >= 2 and config.reconstruction == "turn"

    def encoded(found: list[PreferencePair]) -> PairDataset:
        if job.skip_bad:
            found = usable_pairs(found, encoder, bad)
        return PairDataset(found, encoder, model.config.vocab_size, turns=turns, margin=job.margin)

    train = encoded(pairs)
    valid = encoded(held) if held else None
    with bars() as add, naming_lost_ranks(), leaving_group():
        bar = add("steps", None)

        def progress(step: int, of: int, logs: dict) -> None:
            bar.to(step, of)
            bar.note("  ".join(f"{k} {logs[k]:.4f}" for k in NOTED if k in logs))

        fit = train_pairs(
            model,
            dictionary,
            train,
            config,
            job.out,
            valid=valid,
            head=head,
            original=backbone,
            log=log,
            progress=progress,
        )
    save_pairs(
        fit,
        tokenizer,
        job.out,
        {
            "preferences": job.preferences,
            "max_length": encoder.max_length,
            "pairs": len(train),
            "equal_pairs": train.equal,
            "truncated_conversations": train.truncated,
            "mode": config.mode,
        },
    )
    if not fit.main:
        return bad
    losses = [entry["loss"] for entry in fit.log if "loss" in entry]
    console.print(
        f"{job.out}: mode {mode}, {len(train)} pairs ({train.equal} equal left out, "
        f"{train.truncated} conversations cut to {encoder.max_length} tokens), "
        f"{len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}",
        soft_wrap=True,
    )
    if fit.held_out:
        console.print(
            f"held out: accuracy {100 * fit.held_out['eval_accuracy']:.1f} %, Bradley-Terry loss "
            f"{fit.held_out['eval_bradley_terry']:.4f} (step {fit.held_out['step']})",
            soft_wrap=True,
        )
    return bad


NOTED = ("loss", "eval_accuracy")


def head_of(sarm_dir: Path) -> Tensor | None:
    """(1, n_latents) head of a SARM checkpoint, to go on from; None for a bare SAE."""
    if not (sarm_dir / "config.json").is_file():
        return None
    for path in sorted(sarm_dir.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                if "score.weight" in file.keys():  # noqa: SIM118  # no mapping
                    return file.get_tensor("score.weight").float()[:1]
        except SafetensorError as error:
            raise InputError(f"{path}: corrupt or half-written ({error})") from error
    return None
