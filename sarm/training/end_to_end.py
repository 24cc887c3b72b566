"""Modes 0 to 3 from a backbone, an SAE and preferences to a saved SARM; a killed run goes on."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sarm.backbone import quiet_transformers
from sarm.checkpoint import replace_files
from sarm.errors import InputError
from sarm.modeling import SarmForSequenceClassification
from sarm.packing.differentiable import packed_attention
from sarm.sae import TopKSAE
from sarm.states import fingerprint
from sarm.training.adapters import add_lora, merge_lora
from sarm.training.allocator import return_big_blocks
from sarm.training.collate import PairDataset
from sarm.training.distributed import fsdp
from sarm.training.distributed.world import launched
from sarm.training.modes import PairModel
from sarm.training.reward import REPORT
from sarm.training.runs import claim_run
from sarm.training.trainer import PairTrainConfig, PairTrainer

WORK = ".progress"


@dataclass(frozen=True)
class PairFit:
    """A trained SARM and what the Trainer logged.

    main: whether this process is rank 0, which saves. Of several under FSDP it alone has weights.
    """

    model: SarmForSequenceClassification
    log: list[dict]
    main: bool = True

    @property
    def held_out(self) -> dict[str, float] | None:
        """The evaluation with the lowest held-out Bradley-Terry loss: of the model that is kept."""
        found = [entry for entry in self.log if "eval_bradley_terry" in entry]
        return min(found, key=lambda entry: entry["eval_bradley_terry"], default=None)


def train_pairs(
    backbone: PreTrainedModel,
    sae: TopKSAE,
    train: PairDataset,
    config: PairTrainConfig,
    out: str | Path,
    *,
    valid: PairDataset | None = None,
    head: Tensor | None = None,
    original: Callable[[], PreTrainedModel] | None = None,
    log: str = "none",
    progress: Callable[[int, int, dict], None] = lambda step, of, logs: None,
) -> PairFit:
    """Train a SARM on preference pairs in one of the published modes.

    Checkpoints lie in `out`/.progress; a run that was killed goes on from the last whole one and
    ends, in one process, with the weights of an uninterrupted run. With a held-out set the best
    checkpoint is kept, not the last.

    Args:
        backbone: changed in place.   sae: copied; learns in fp32.
        head: (1, n_latents) to start from; None: zero, as published.
        original: loads the backbone in floating point; needed for LoRA on an 8-bit one.
        log: see `PairTrainer`.   progress: called with (step, of how many, last log entry).
    Raises:
        InputError: bad settings; a loss that is NaN or infinite (names the batch; the last
        checkpoint stays); `out` holds a run with other settings, data or weights (says in what);
        a checkpoint that cannot be written.
    """
    if sae.d_model != backbone.config.hidden_size:
        raise InputError(
            f"the SAE has d_model={sae.d_model}, the backbone {backbone.config.hidden_size}"
        )
    if backbone.device.type == "cpu":
        return_big_blocks()
    sae = copy.deepcopy(sae).float().to(backbone.device)
    head = torch.zeros(1, sae.n_latents) if head is None else head
    work = Path(out) / WORK
    identity = {
        **asdict(config),
        "backbone": fingerprint(backbone),
        "sae": fingerprint(sae),
        "head": digest([head.numpy()]),
        "pairs": fingerprint_pairs(train),
        "held-out pairs": valid and fingerprint_pairs(valid),
    }
    if launched()[0] == 0:  # the others stop with it: rank 0 speaks for all
        claim_run(work, identity)
    if config.lora is not None:
        torch.manual_seed(config.seed)
        add_lora(backbone, config.lora)
    sarm = SarmForSequenceClassification.from_parts(backbone, sae, head)
    model = PairModel(
        sarm,
        config.mode,
        reconstruction=config.reconstruction_weight,
        centre=config.centre,
        kept_tokens=config.kept_tokens,
    )
    # FSDP changes modules for good: what is to be saved is put together beside them
    bare = fsdp.skeleton(sarm) if fsdp.asked_for() and launched()[1] > 1 else None
    with packed_attention(backbone), checkpointed(backbone, config.checkpointing):
        trainer = PairTrainer(model, config, work, train, valid, log=log, progress=progress)
        with quiet_transformers():
            entries = trainer.run()
    main = trainer.args.process_index == 0
    if bare is not None:
        sarm = fsdp.restored(bare, model.sarm, main)
        sarm.sae.lay_out_by_latent()
        sae, backbone = sarm.sae, sarm.model  # type: ignore[assignment]  # a TopK SAE went in
        if not main:
            return PairFit(sarm, entries, main)
    if config.lora is not None:
        plain = all(p.is_floating_point() for p in backbone.parameters())
        if not plain and original is None:
            raise InputError("LoRA on an 8-bit backbone needs its original weights at the end")
        merged = merge_lora(backbone, None if plain or original is None else original())
        sarm = SarmForSequenceClassification.from_parts(merged, sae, sarm.score.weight)
    return PairFit(sarm.eval().requires_grad_(True), entries, main)


def save_pairs(fit: PairFit, tokenizer, out: str | Path, report: dict) -> None:
    """Write SARM, tokenizer and `training.json` into `out`, all or none; drop the checkpoints.

    Of several processes rank 0 does, the others return at once.
    """
    out = Path(out)
    if not fit.main:
        return
    with replace_files(out) as staging:
        tokenizer.save_pretrained(staging)
        text = json.dumps({**report, "held_out": fit.held_out, "log": fit.log}, indent=2)
        (staging / REPORT).write_text(text + "\n", "utf-8")
        fit.model.save_pretrained(staging)
    shutil.rmtree(out / WORK, ignore_errors=True)


@contextlib.contextmanager
def checkpointed(backbone: PreTrainedModel, on: bool) -> Iterator[None]:
    """Gradient checkpointing of the backbone's layers while open."""
    if not on:
        yield
        return
    enable = getattr(backbone, "activation_checkpointing_enable", None)
    (enable or backbone.gradient_checkpointing_enable)({"use_reentrant": False})
    try:
        yield
    finally:
        disable = getattr(backbone, "activation_checkpointing_disable", None)
        (disable or backbone.gradient_checkpointing_disable)()


def fingerprint_pairs(pairs: PairDataset) -> str:
    """Names the token ids and margins of a data set, in order."""
    return digest(part for pair in pairs.pairs for part in (*pair.ids, repr(pair.margin).encode()))


def digest(parts) -> str:
    """BLAKE2b of buffers, each with its length."""
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        view = memoryview(part).cast("B")
        made.update(len(view).to_bytes(8, "little"))
        made.update(view)
    return made.hexdigest()
