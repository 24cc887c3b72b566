"""Training a TopK SAE: normalised MSE, unit-norm decoder, resumable to the bit.

The SAE learns on per-token normalised states that are then standardised per dimension (an affine
map, folded into the published parameters when it is saved). Without that, one constant vector and a
few dimensions hold nearly all the energy at the scored token, and MSE / ||x||^2 rewards an SAE for
reconstructing what every response has in common.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sarm.checkpoint import SAE_CONFIG, read_metadata, replace_file, replace_files, save_sae
from sarm.errors import InputError
from sarm.sae import TopKSAE
from sarm.states import StateCache, fingerprint
from sarm.tokens import Conversation
from sarm.training.activations import WindowMaker, mixture
from sarm.training.stream import Chunk, Corpus, StateStream, survey

CHECKPOINT = (
    "trainer.safetensors"  # its metadata holds the place in the corpus: one file, one rename
)
RUN_FILE = "run.json"  # what the folder's run is, written before anything is computed


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

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be trained with (the SAE checks n_latents and k)."""
        for name, least in (
            ("passes", 1),
            ("batch_size", 1),
            ("chunk_states", 2),
            ("max_states", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"train-sae: {name} must be at least {least}, got {value}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise InputError(f"train-sae: lr must be positive and finite, got {self.lr}")

    @property
    def peak_lr(self) -> float:
        """The learning rate between warm-up and decay."""
        return self.lr if self.lr is not None else 2e-3 / math.sqrt(self.n_latents / 2048)


@dataclass(frozen=True)
class SaeReport:
    """How training ended.

    fvu: squared error over the variance around the mean.  normalized_mse: mean of
    ||x - x'||^2 / ||x||^2.  dead: share of latents that never fired. All three over the last chunk
    that was at least half full.
    """

    states: int
    tokens: int
    steps: int
    fvu: float
    normalized_mse: float
    dead: float
    seconds: float


class SaeTrainer:
    """Streams text and conversations through the backbone and trains an SAE on its states.

    Args:
        backbone, tokenizer: the cut decoder and its tokenizer.
        config: see `SaeTrainConfig`.
        out: folder of the SAE; `out/.progress` holds what a resumed run needs.
        cache: states of conversations are looked up and kept in it, see `StateStream`.
    """

    def __init__(
        self,
        backbone,
        tokenizer,
        config: SaeTrainConfig,
        out: str | Path,
        cache: StateCache | None = None,
    ) -> None:
        self.config, self.out = config, Path(out)
        self.backbone = backbone
        self.maker = WindowMaker(tokenizer, config.activations, config.context, config.chat)
        self.work = self.out / ".progress"
        self.stream = StateStream(
            backbone, self.maker.end_id, self.work / "states", config.chunk_states, cache=cache
        )
        d_model = backbone.config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
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
        conversations: Callable[[], Iterable[tuple[str, Conversation]]] | None = None,
        *,
        on_survey: Callable[[Corpus], None] = lambda corpus: None,
        on_states: Callable[[int], None] = lambda states: None,
        on_step: Callable[[dict[str, float]], None] = lambda metrics: None,
    ) -> SaeReport:
        """Train to the end (or from where a killed run stopped), save the SAE, return the report.

        Args:
            texts: makes a fresh iterator over the documents each time it is called.
            conversations: the same for (where, conversation). They give one state each, at the
                token that is scored, and are mixed in evenly.
            on_survey, on_states, on_step: progress, see `Corpus` and the metrics of a step.
        Raises:
            InputError: empty corpus, loss not finite, or a folder with another run: other
            settings, another backbone, another corpus.
        """

        def windows():
            text = self.maker.windows(texts())
            return (
                text if conversations is None else mixture(text, self.maker.scored(conversations()))
            )

        corpus = survey(windows(), self.config.max_states, self.config.chunk_states)
        if corpus.states < 2:
            raise InputError("train-sae: the corpus gives fewer than 2 states to learn from")
        self._claim(corpus)
        on_survey(corpus)
        steps = sum(math.ceil(states / self.config.batch_size) for states in corpus.chunks)
        self.total_steps = steps * self.config.passes
        self.resume()
        on_states(self.states)
        started = time.perf_counter()
        if self.states < corpus.states:
            for chunk in self.stream.chunks(
                windows(),
                documents_done=self.documents,
                limit=corpus.states - self.states,
                progress=on_states,
            ):
                self._learn(chunk, on_step)
                self.chunk, self.documents = self.chunk + 1, chunk.documents
                self.states += len(chunk.states)
                self.tokens += chunk.tokens
                now = time.perf_counter()
                self.seconds, started = self.seconds + now - started, now
                self.save_progress()
        save_sae(
            self.folded(),
            self.out,
            {"source": origin_of(self.backbone), "training": asdict(self.config), **self._last},
        )
        return SaeReport(self.states, self.tokens, self.step, seconds=self.seconds, **self._last)

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
            last = epoch == self.config.passes - 1
            order = shuffle(len(states), self.config.seed, self.chunk, epoch)
            for rows in order.split(self.config.batch_size):
                x = states[rows].to(device)
                squared, idx = self._step(x)
                metrics = self._metrics(x, squared)
                on_step(metrics)
                if last:
                    fired[idx.flatten().cpu()] = True
                    error += float(squared.sum())
                    variance += float((x.cpu() - mean).square().sum())
                    mse += metrics["normalized_mse"] * len(x) / len(states)
        if not all(torch.isfinite(p).all() for p in self.sae.parameters()):
            raise InputError(
                f"train-sae: weights are not finite after step {self.step}{self._kept()}"
            )
        if self.chunk == 0 or len(states) >= self.config.chunk_states / 2:
            self._last = {
                "fvu": error / max(variance, 1e-12),
                "normalized_mse": mse,
                "dead": 1.0 - float(fired.float().mean()),
            }

    def _kept(self) -> str:
        return (
            f"; the checkpoint of chunk {self.chunk - 1} is kept in {self.work}"
            if self.chunk
            else ""
        )

    def _step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One Adam step; returns each row's squared error and the latents that fired."""
        latents = self.sae.encode_normalized(x)
        squared = (self.sae.decode(latents) - x).square().sum(1)
        loss = (squared / x.square().sum(1).clamp_min(1e-12)).mean()
        if not torch.isfinite(loss):
            raise InputError(
                f"train-sae: the loss is {loss.item()} at step {self.step} (chunk {self.chunk})"
                f"{self._kept()}"
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
        gradient = self.sae.decoder.weight.grad
        assert gradient is not None
        rows, gradient = self.sae.w_dec, gradient.t()
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
        tensors = {
            f"sae.{n}": t.detach().cpu().contiguous() for n, t in self.sae.state_dict().items()
        }
        for name, parameter in self.sae.named_parameters():
            state = self.optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq", "step"):
                tensors[f"adam.{key}.{name}"] = state[key].detach().cpu().contiguous()
        tensors["mean"], tensors["std"] = self.mean, self.std
        place = {
            name: getattr(self, name)
            for name in ("step", "chunk", "documents", "states", "tokens", "seconds")
        }
        record = json.dumps({"place": place, "last": self._last})
        with replace_files(self.work) as staging:
            save_file(tensors, staging / CHECKPOINT, {"record": record})

    def _claim(self, corpus: Corpus) -> None:
        """Note in `out` which run this is; refuse a folder that holds another one."""
        mine = {
            **asdict(self.config),
            "backbone": fingerprint(self.backbone),
            "corpus": f"{corpus.documents} documents, {corpus.tokens} tokens",
        }
        path = self.work / RUN_FILE
        if path.is_file():
            earlier = json.loads(path.read_text("utf-8"))
            for name, value in mine.items():
                if earlier.get(name) != value:
                    raise InputError(
                        f"{self.out}: holds a run with {name}={earlier.get(name)!r}, this one has "
                        f"{name}={value!r}; choose another folder or delete {self.work}"
                    )
            return
        with replace_file(path) as file:
            json.dump(mine, file, indent=2)

    def resume(self) -> None:
        """Take up a killed run's checkpoint in `out`, if there is one."""
        path = self.work / CHECKPOINT
        if not path.is_file():
            return
        record = json.loads(read_metadata(path)["record"])
        with torch.no_grad(), safe_open(path, framework="pt") as file:
            for name, parameter in self.sae.named_parameters():
                parameter.copy_(file.get_tensor(f"sae.{name}"))
                self.optimizer.state[parameter] = {
                    "step": file.get_tensor(f"adam.step.{name}"),
                    **{
                        key: torch.empty_like(parameter).copy_(
                            file.get_tensor(f"adam.{key}.{name}")
                        )
                        for key in ("exp_avg", "exp_avg_sq")
                    },
                }
            self.mean, self.std = file.get_tensor("mean"), file.get_tensor("std")
        for name, value in record["place"].items():
            setattr(self, name, value)
        self._last = record["last"]


def origin_of(backbone) -> dict:
    """What an SAE's `sae.json` says of the backbone it was trained on; see `check_origin`."""
    return {
        "layer": backbone.config.num_hidden_layers,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(backbone),
    }


def check_origin(sae_dir: Path, backbone) -> None:
    """Refuse an SAE that says it was trained on another backbone or layer.

    An SAE without a `sae.json` (a published `.pt`, say) cannot tell, and passes.
    """
    path = sae_dir / SAE_CONFIG
    source = json.loads(path.read_text("utf-8")).get("source") if path.is_file() else None
    if source is None:
        return
    mine = origin_of(backbone)
    # the fingerprint is of the weights as they are held, so it is comparable within one dtype
    names = ("layer", "fingerprint") if source["dtype"] == mine["dtype"] else ("layer",)
    for name in names:
        if source[name] != mine[name]:
            raise InputError(
                f"{sae_dir}: trained on a backbone with {name} {source[name]}, "
                f"this one has {name} {mine[name]}"
            )


def shuffle(count: int, seed: int, chunk: int, epoch: int) -> Tensor:
    """The order in which a chunk's states are learnt from: the same in every process."""
    digest = hashlib.blake2b(f"{seed}/{chunk}/{epoch}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randperm(count, generator=generator)
