"""`transformers.Trainer` for a SARM on packed preference pairs: modes 0 to 3.

The Trainer brings the loop, Accelerate, logging and checkpoints. Here: three learning rates, the
pairs of a loss that is no number, checkpoints that are whole or not there, and the rewards of a
held-out set.
"""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from sarm.errors import InputError, first_line
from sarm.training.collate import PairDataset
from sarm.training.distributed import fsdp
from sarm.training.distributed.pairs import FilledPairs, PairOrder, collate_filled, counted
from sarm.training.distributed.world import launched, timeout_s
from sarm.training.head import pair_accuracy
from sarm.training.modes import RECONSTRUCTION, PairModel
from sarm.training.runs import last_whole, mark_whole

WEIGHTS = "trained.safetensors"
LOGS = "logs"
PARTS = ("bradley_terry", "reconstruction")
#: What evaluation and early stopping go by.
JUDGED_BY = "eval_bradley_terry"


@dataclass(frozen=True)
class PairTrainConfig:
    """Everything that decides the result; a resumed run must have the same.

    mode: 0 to 3, see `sarm.training.modes`.  epochs, batch_size (pairs a step, over all machines),
    lr, warmup (share of the steps), weight_decay: as published; the schedule is a cosine.
    micro_batch: pairs in one forward pass.  lr_sae, lr_head: None: `lr`.
    clip: largest gradient norm, 0: any.  centre: see `bradley_terry`.
    reconstruction: "turn" (tokens of the last assistant turn) or "last"; reconstruction_weight.
    checkpointing: activations of a layer are computed again in the backward pass; kept_tokens: only
    as far as a pack has more tokens than this, see `wanted_states`.
    bf16: autocast; weights stay in the dtype they have.
    lora: rank of adapters on the backbone; None: all of its weights learn.
    eval_every: steps between evaluations and checkpoints; None: an epoch.
    patience: stop after so many evaluations without a lower held-out Bradley-Terry loss.
    """

    mode: int
    epochs: float = 3.0
    batch_size: int = 512
    micro_batch: int = 8
    lr: float = 4e-6
    lr_sae: float | None = None
    lr_head: float | None = None
    warmup: float = 0.03
    weight_decay: float = 1e-3
    clip: float = 1.0
    centre: float = 0.0
    reconstruction: str = "turn"
    reconstruction_weight: float = 1.0
    checkpointing: bool = False
    kept_tokens: int | None = None
    bf16: bool = False
    lora: int | None = None
    eval_every: int | None = None
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reconstruction not in RECONSTRUCTION:
            raise InputError(
                f"reconstruction must be one of {', '.join(RECONSTRUCTION)}, "
                f"got {self.reconstruction!r}"
            )
        for name in ("epochs", "lr", "lr_sae", "lr_head"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name} must be positive, got {value}")
        for name in ("centre", "clip", "reconstruction_weight", "weight_decay"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(f"{name} must be >= 0, got {value}")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup must be a share of the steps, in [0, 1), got {self.warmup}")
        for name in ("batch_size", "micro_batch", "kept_tokens", "eval_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.kept_tokens is not None and not self.checkpointing:
            raise InputError("kept_tokens belongs to checkpointing")
        if self.lora is not None and self.mode == 0:
            raise InputError("LoRA adapts a backbone that learns; in mode 0 it does not")

    def arguments(self, folder: Path, log: str, has_valid: bool) -> TrainingArguments:
        """For the Trainer.

        Raises:
            InputError: the batch is no multiple of the micro-batch times the number of processes.
        """
        _, processes = launched()
        micro = min(self.micro_batch, self.batch_size)
        if self.batch_size % (micro * processes):
            raise InputError(
                f"batch_size must be a multiple of micro_batch x processes = {micro} x "
                f"{processes}, got {self.batch_size}"
            )
        when = "epoch" if self.eval_every is None else "steps"
        return TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=self.epochs,
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=micro,
            gradient_accumulation_steps=self.batch_size // (micro * processes),
            learning_rate=self.lr,
            lr_scheduler_type="cosine",
            warmup_steps=self.warmup,
            weight_decay=self.weight_decay,
            max_grad_norm=self.clip,
            bf16=self.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=self.seed,
            data_seed=self.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,  # such a loss ends the run here
            eval_strategy=when if has_valid else "no",
            save_strategy=when,
            eval_steps=self.eval_every,
            save_steps=self.eval_every or 500,
            save_total_limit=2,
            load_best_model_at_end=has_valid,
            metric_for_best_model=JUDGED_BY if has_valid else None,
            greater_is_better=False,
            restore_callback_states_from_checkpoint=True,
            label_names=["margins"],
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            ddp_timeout=timeout_s(),
            report_to=log,
            disable_tqdm=True,
        )


class PairTrainer(Trainer):
    """Trains a `PairModel` on a `PairDataset`.

    Args:
        folder: of checkpoints; tensorboard's logs lie beside it, in `logs`.
        log: "none", "tensorboard", "wandb", or another integration of the Trainer.
        progress: called with (step, of how many, what was logged last).

    Launched with others (`torchrun`, `accelerate launch`), each process learns from its pairs of
    every step; rank 0 writes. Checkpoints are the same for any number of processes.
    """

    loss_is_scaled_for_ga = True  # by the pairs of a step, see compute_loss

    def __init__(
        self,
        model: PairModel,
        config: PairTrainConfig,
        folder: Path,
        train: PairDataset,
        valid: PairDataset | None = None,
        *,
        log: str = "none",
        progress: Callable[[int, int, dict], None] = lambda step, of, logs: None,
    ) -> None:
        self.config = config
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        if config.patience is not None and valid is None:
            raise InputError("patience needs a held-out set to judge by")
        super().__init__(
            model=model,
            args=config.arguments(folder, log, valid is not None),
            data_collator=collate_filled,
            train_dataset=FilledPairs(train),
            eval_dataset=valid,
            compute_metrics=judge,
            callbacks=[_Progress(progress)],
        )
        self.remove_callback(PrinterCallback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):  # checkpoints go at the end, logs stay
                callback.logging_dir = str(folder.parent / LOGS)
        if config.patience is not None:
            self.add_callback(EarlyStoppingCallback(config.patience))

    def run(self) -> list[dict]:
        """Train, from the last whole checkpoint if there is one; returns the log's entries."""
        with self.args.main_process_first():  # it removes halves
            found = last_whole(Path(str(self.args.output_dir)))
        self.train(resume_from_checkpoint=str(found) if found else None)
        return self.state.log_history

    def create_optimizer(self, model=None):
        """One group for each part of the SARM, without weight decay for its vectors."""
        if self.optimizer is None:
            if self.is_fsdp_enabled:  # before it: the optimiser is to hold the shards
                learner: Any = self.model
                fsdp.shard(learner, self.accelerator.state.fsdp_plugin)
            config = self.config
            rates = {
                "sarm.model.": config.lr,
                "sarm.sae.": config.lr_sae or config.lr,
                "sarm.score.": config.lr_head or config.lr,
            }
            groups: dict[tuple[float, float], list[Tensor]] = defaultdict(list)
            learner = self.model if model is None else model
            for name, parameter in learner.named_parameters():
                if parameter.requires_grad:
                    rate = next(r for part, r in rates.items() if part in name)
                    decay = config.weight_decay if parameter.ndim > 1 else 0.0
                    groups[rate, decay].append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(
                [
                    {"params": parameters, "lr": rate, "weight_decay": decay}
                    for (rate, decay), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The model's loss; one that is NaN or infinite ends the run and names its pairs."""
        where = inputs["where"]
        found = model(margins=inputs["margins"], batch=inputs["batch"])
        if not torch.isfinite(found["loss"]):
            raise InputError(
                f"train-rm: the loss is {found['loss'].item()} at step {self.state.global_step} "
                f"in the batch {', '.join(where)}{self._kept()}"
            )
        if model.training:
            # DDP and FSDP average over processes; this makes of it a sum over the step's pairs
            weight = counted(inputs) / num_items_in_batch * self.args.world_size
            found["loss"] = found["loss"] * weight
            for part in PARTS:
                if part in found:
                    self._parts[part].append(found[part] * weight)
        return (found["loss"], found) if return_outputs else found["loss"]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, and how many pairs all processes have in it."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        mine = torch.tensor(sum(map(counted, batches)), device=device)
        return batches, int(self.accelerator.reduce(mine, "sum"))

    def _get_train_sampler(self, train_dataset=None):
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        block = self.args.per_device_train_batch_size * self.args.world_size
        return PairOrder(
            len(data), block, self.config.seed, lambda: int((self.state.epoch or 0) + 1e-6)
        )

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer; FSDP works on the CPU too."""
        super().create_accelerator_and_postprocess()
        fsdp.enable_on_cpu(self.accelerator)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def _clip_grad_norm(self, model):
        norm = fsdp.whole(super()._clip_grad_norm(model))
        if norm is not None and not math.isfinite(norm):
            raise InputError(
                f"train-rm: the gradient's norm is {float(norm)} at step "
                f"{self.state.global_step}{self._kept()}"
            )
        return norm

    def _kept(self) -> str:
        found = last_whole(Path(str(self.args.output_dir)))
        return f"; {found} is kept" if found else ""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Rewards (B, 2) as predictions, margins as labels."""
        return super().prediction_step(model, inputs, prediction_loss_only, list(PARTS))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss's parts, averaged since the last entry."""
        if "loss" in logs:
            sums = {name: torch.stack(v).sum() for name, v in self._parts.items()}
            logs |= {n: self.accelerator.reduce(s, "mean").item() for n, s in sums.items()}
            self._parts.clear()
        super().log(logs, start_time)

    # ---- checkpoints: the parameters that learn ---------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the parameters that learn; all processes call this, rank 0 writes."""
        model = self.accelerator.unwrap_model(self.model)
        tensors = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                tensor = fsdp.whole(parameter.detach())
                if self.args.should_save:
                    tensors[name] = tensor.cpu().contiguous()
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = fsdp.whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            schedule: Any = self.lr_scheduler
            torch.save(schedule.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        fsdp.load_optimizer_state(self.optimizer, optimizer)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(schedule)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        state = model.state_dict()  # shares its memory with the parameters
        for name, tensor in load_file(Path(resume_from_checkpoint) / WEIGHTS).items():
            fsdp.fill(state[name], tensor)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                mark_whole(folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save: RuntimeError
            shutil.rmtree(folder, ignore_errors=True)
            raise InputError(
                f"{folder}: cannot be written ({first_line(error)}){self._kept()}"
            ) from error


def judge(prediction: EvalPrediction) -> dict[str, float]:
    """Held-out accuracy (a tie counts a half), Bradley-Terry loss and mean reward difference."""
    rewards, margins = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    differences = rewards[:, 0] - rewards[:, 1]
    return {
        "accuracy": pair_accuracy(differences),
        "bradley_terry": float(np.logaddexp(0, margins - differences).mean()),
        "difference": float(differences.mean()),
    }


class _Progress(TrainerCallback):
    def __init__(self, report: Callable[[int, int, dict], None]) -> None:
        self._report = report

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._report(state.global_step, state.max_steps, logs or {})
