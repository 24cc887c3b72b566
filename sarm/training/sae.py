"""Training a TopK SAE: normalised MSE, unit-norm decoder, resumable to the bit.

The SAE learns on per-token normalised states that are then standardised per dimension (an affine
map, folded into the published parameters when it is saved). Without that, one constant vector and a
few dimensions hold nearly all the energy at the scored token, and MSE / ||x||^2 rewards an SAE for
reconstructing what every response has in common.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarm.checkpoint import replace_files, save_sae
from sarm.errors import InputError
from sarm.sae import TopKSAE
from sarm.training.activations import WindowMaker
from sarm.training.stream import Chunk, Corpus, StateStream, survey

CHECKPOINT = "trainer.safetensors"
PROGRESS_FILE = "trainer.json"


@dataclass(frozen=True)
class SaeTrainConfig:
    """Everything that decides the result; a resumed run must have the same.

    n_latents, k: the SAE.  activations, context, chat: see `WindowMaker`.
    max_states: stop after so many states (None: the whole corpus).
    chunk_states, passes: each chunk of the stream is shuffled and seen `passes` times.
    batch_size, lr: Adam; warm-up over the first 5 % of steps, decay to zero over the last 20 %.
    lr None: 2e-3 / sqrt(n_latents / 2048), the scaling of arXiv 2406.04093.
    standardize: per dimension, over the first chunk.
    """

    n_latents: int
    k: int
    activations: str = "sentence"
    context: int = 1024
    chat: bool = False
    max_states: int | None = None
    chunk_states: int = 131072
    passes: int = 1
    batch_size: int = 1024
    lr: float | None = None
    standardize: bool = True
    seed: int = 0

    @property
    def peak_lr(self) -> float:
        return self.lr if self.lr is not None else 2e-3 / math.sqrt(self.n_latents / 2048)


@dataclass(frozen=True)
class SaeReport:
    """How training ended.

    fvu: squared error over the variance around the mean, last chunk.  normalized_mse: mean of
    ||x - x'||^2 / ||x||^2.  dead: share of latents that fired for no state of the last chunk.
    """

    states: int
    tokens: int
    steps: int
    fvu: float
    normalized_mse: float
    dead: float
    seconds: float


class SaeTrainer:
    """Streams text through the backbone and trains an SAE on its states.

    Args:
        backbone, tokenizer: the cut decoder and its tokenizer.
        config: see `SaeTrainConfig`.
        out: folder of the SAE; `out/.progress` holds what a resumed run needs.
    """

    def __init__(self, backbone, tokenizer, config: SaeTrainConfig, out: str | Path) -> None:
        self.config, self.out = config, Path(out)
        self.backbone = backbone
        self.maker = WindowMaker(tokenizer, config.activations, config.context, config.chat)
        self.work = self.out / ".progress"
        self.stream = StateStream(backbone, self.maker, self.work / "states", config.chunk_states)
        torch.manual_seed(config.seed)
        d_model = backbone.config.hidden_size
        # inner SAE: lives in standardised coordinates
        self.sae = TopKSAE(d_model, config.n_latents, config.k, normalization="none")
        self.mean, self.std = torch.zeros(d_model), torch.ones(d_model)
        self.optimizer = torch.optim.Adam(
            self.sae.parameters(), lr=config.peak_lr, betas=(0.9, 0.999), fused=True
        )
        self.step = self.chunk = self.documents = self.states = self.tokens = 0
        self.seconds = 0.0
        self._last: dict[str, float] = {}

    def run(
        self,
        texts: Callable[[], Iterable[str]],
        *,
        on_survey: Callable[[Corpus], None] = lambda corpus: None,
        on_states: Callable[[int], None] = lambda states: None,
        on_step: Callable[[dict[str, float]], None] = lambda metrics: None,
    ) -> SaeReport:
        """Train to the end (or from where a killed run stopped), save the SAE, return the report.

        Args:
            texts: makes a fresh iterator over the documents each time it is called.
            on_survey, on_states, on_step: progress, see `Corpus` and the metrics of a step.
        Raises:
            InputError: empty corpus, loss not finite, or a resumed run with another config.
        """
        corpus = survey(texts(), self.maker, self.config.max_states)
        if corpus.states < 2:
            raise InputError("train-sae: the corpus gives fewer than 2 states to learn from")
        on_survey(corpus)
        total = min(corpus.states, self.config.max_states or corpus.states)
        self.total_steps = max(1, math.ceil(total / self.config.batch_size)) * self.config.passes
        self.resume()
        on_states(self.states)
        remaining = None if self.config.max_states is None else total - self.states
        started = time.perf_counter()
        if remaining is None or remaining > 0:
            for chunk in self.stream.chunks(
                texts(), documents_done=self.documents, limit=remaining, progress=on_states
            ):
                self._learn(chunk, on_step)
                self.chunk, self.documents = self.chunk + 1, chunk.documents
                self.states += len(chunk.states)
                self.tokens += chunk.tokens
                now = time.perf_counter()
                self.seconds, started = self.seconds + now - started, now
                self.save_progress()
        save_sae(self.folded(), self.out, {"training": asdict(self.config), **self._last})
        return SaeReport(
            self.states, self.tokens, self.step, seconds=self.seconds, **self._last
        )

    # ---- learning --------------------------------------------------------------------------

    def _learn(self, chunk: Chunk, on_step) -> None:
        states = chunk.states
        if self.chunk == 0 and self.config.standardize:
            self.mean = states.mean(0)
            self.std = states.std(0).clamp_min(1e-4)
        states = (states - self.mean) / self.std
        device = self.backbone.device
        fired = torch.zeros(self.config.n_latents, dtype=torch.bool)
        error = variance = mse = 0.0
        mean = states.mean(0)
        for epoch in range(self.config.passes):
            generator = torch.Generator().manual_seed(
                hash((self.config.seed, self.chunk, epoch)) & 0x7FFFFFFF
            )
            last = epoch == self.config.passes - 1
            for rows in torch.randperm(len(states), generator=generator).split(
                self.config.batch_size
            ):
                x = states[rows].to(device)
                squared, idx = self._step(x)
                metrics = self._metrics(x, squared)
                on_step(metrics)
                if last:
                    fired[idx.flatten().cpu()] = True
                    error += float(squared.sum())
                    variance += float((x.cpu() - mean).square().sum())
                    mse += metrics["normalized_mse"] * len(x) / len(states)
        self._last = {
            "fvu": error / max(variance, 1e-12),
            "normalized_mse": mse,
            "dead": 1.0 - float(fired.float().mean()),
        }

    def _step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One Adam step; returns each row's squared error and the latents that fired."""
        latents = self.sae.encode_normalized(x)
        squared = (self.sae.decode(latents) - x).square().sum(1)
        loss = (squared / x.square().sum(1).clamp_min(1e-12)).mean()
        if not torch.isfinite(loss):
            raise InputError(
                f"train-sae: the loss is {loss.item()} at step {self.step} (chunk {self.chunk}); "
                f"the last good checkpoint is kept in {self.work}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._project_decoder_gradient()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.peak_lr * self._schedule()
        self.optimizer.step()
        self._renormalize_decoder()
        self.step += 1
        return squared.detach(), latents.idx

    def _schedule(self) -> float:
        """Warm-up over 5 % of the steps, then constant, then linear to zero over the last 20 %."""
        warmup = max(1, self.total_steps // 20)
        decay = max(1, self.total_steps // 5)
        left = self.total_steps - self.step
        return min(1.0, (self.step + 1) / warmup, max(0.0, left / decay))

    @torch.no_grad()
    def _project_decoder_gradient(self) -> None:
        """Remove the part of each latent's gradient along its unit row: it cannot change length."""
        rows, gradient = self.sae.w_dec, self.sae.decoder.weight.grad.t()
        gradient -= (gradient * rows).sum(1, keepdim=True) * rows

    @torch.no_grad()
    def _renormalize_decoder(self) -> None:
        rows = self.sae.w_dec
        rows /= rows.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def _metrics(self, x: Tensor, squared: Tensor) -> dict[str, float]:
        energy = x.square().sum(1).clamp_min(1e-12)
        return {
            "step": self.step,
            "of": self.total_steps,
            "normalized_mse": float((squared / energy).mean()),
        }

    # ---- saving and resuming ---------------------------------------------------------------

    @torch.no_grad()
    def folded(self) -> TopKSAE:
        """The SAE in published coordinates: standardisation folded into its parameters, exactly.

        z = W ((x - m) / s - b) + c = (W / s) (x - (m + s b)) + c;  x' = (s D) z + (m + s b).
        """
        inner, mean, std = self.sae, self.mean.double(), self.std.double()
        sae = TopKSAE(inner.d_model, inner.n_latents, inner.k, normalization="token")
        sae.encoder.weight.copy_(inner.encoder.weight.cpu().double() / std)
        sae.decoder.weight.copy_(inner.decoder.weight.cpu().double() * std[:, None])
        sae.pre_bias.copy_(mean + std * inner.pre_bias.cpu().double())
        sae.latent_bias.copy_(inner.latent_bias.cpu())
        return sae.eval()

    def save_progress(self) -> None:
        """Weights, optimiser and place in the corpus, written whole or not at all."""
        tensors = {f"sae.{n}": t.detach().cpu().contiguous() for n, t in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            state = self.optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq", "step"):
                tensors[f"adam.{key}.{name}"] = state[key].detach().cpu().contiguous()
        tensors["mean"], tensors["std"] = self.mean, self.std
        place = {
            name: getattr(self, name)
            for name in ("step", "chunk", "documents", "states", "tokens", "seconds")
        }
        with replace_files(self.work) as staging:
            save_file(tensors, staging / CHECKPOINT)
            record = {"config": asdict(self.config), "place": place, "last": self._last}
            (staging / PROGRESS_FILE).write_text(json.dumps(record, indent=2) + "\n", "utf-8")

    def resume(self) -> None:
        """Take up a killed run's checkpoint in `out`, if there is one."""
        record_file = self.work / PROGRESS_FILE
        if not record_file.is_file():
            return
        record = json.loads(record_file.read_text("utf-8"))
        mine = asdict(self.config)
        other = {k: v for k, v in record["config"].items() if mine.get(k) != v}
        if other:
            name, value = next(iter(other.items()))
            raise InputError(
                f"{self.out}: holds a run with {name}={value!r}, this one has "
                f"{name}={mine.get(name)!r}; choose another folder or the same settings"
            )
        tensors = load_file(self.work / CHECKPOINT)
        with torch.no_grad():
            for name, parameter in self.sae.named_parameters():
                parameter.copy_(tensors[f"sae.{name}"])
                self.optimizer.state[parameter] = {
                    "step": tensors[f"adam.step.{name}"].clone(),
                    "exp_avg": torch.empty_like(parameter).copy_(tensors[f"adam.exp_avg.{name}"]),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(
                        tensors[f"adam.exp_avg_sq.{name}"]
                    ),
                }
        self.mean, self.std = tensors["mean"], tensors["std"]
        for name, value in record["place"].items():
            setattr(self, name, value)
        self._last = record["last"]
