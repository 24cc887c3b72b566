"""Training a TopK SAE on a stream of states, resumable to the bit.

The SAE learns on per-token normalised states that are then standardised per dimension (an affine
map, folded into the published parameters when it is saved). Without that, one constant vector and a
few dimensions hold nearly all the energy at the scored token, and MSE / ||x||^2 rewards an SAE for
reconstructing what every response has in common.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sarm.checkpoint import save_sae
from sarm.errors import InputError
from sarm.ops import SparseLatents
from sarm.sae import TopKSAE
from sarm.states import StateCache, fingerprint
from sarm.tokens import Conversation
from sarm.training.activations import POSITIONS, SCORED, WindowMaker, mixture
from sarm.training.distributed.extraction import stream_of
from sarm.training.distributed.learner import NoLog, data_parallel
from sarm.training.distributed.sharded_sae import narrowed, shard_of, unsharded
from sarm.training.distributed.world import World
from sarm.training.sae import progress
from sarm.training.sae.average import Average
from sarm.training.sae.config import SaeTrainConfig
from sarm.training.sae.dead import auxk_loss, resample
from sarm.training.sae.log import MetricsLog
from sarm.training.sae.metrics import Firing, Moments, geometric_median
from sarm.training.sae.optimizer import SaeOptimizer
from sarm.training.sae.origin import origin_of
from sarm.training.sae.schedule import Schedule
from sarm.training.stream import Chunk, Corpus, survey

MULTI = 4  # multi-TopK: the second loss is at 4 k,
MULTI_WEIGHT = 1 / 8  # and weighs an eighth
CANDIDATES = 8192  # states of the chunk among which resampling looks for badly explained ones


@dataclass(frozen=True)
class SaeReport:
    """How training ended.

    fvu: squared error over the variance around the mean.  normalized_mse: mean of
    ||x - x'||^2 / ||x||^2.  fvu_by_kind: fvu of each kind of position.  dead: share of latents that
    never fired.  alive_scored: share that fired at a scored token (None: no conversations; if the
    chunk has none: while they were learnt from). All with the saved weights, over the last chunk
    that was at least half full.
    """

    states: int
    tokens: int
    steps: int
    fvu: float
    normalized_mse: float
    dead: float
    seconds: float
    alive_scored: float | None = None
    fvu_by_kind: dict[str, float] = field(default_factory=dict)


class SaeTrainer:
    """Streams text and conversations through the backbone and trains an SAE on its states.

    Args:
        backbone, tokenizer: the cut decoder and its tokenizer.
        config: see `SaeTrainConfig`.
        out: folder of the SAE; `out/.progress` holds what a resumed run needs.
        cache: states of conversations are looked up and kept in it, see `StateStream`.
        log, log_every: "none", "tensorboard" or "wandb", and steps between two lines.
        prefetch: collect the next chunk's states while the SAE learns from one: a second chunk in
            memory. None: on a GPU, where the two have streams of their own; on a CPU they would
            share the cores. It changes no bit of the result.
        world: the processes that train together (`sarm.training.distributed`); None: this one.
    """

    def __init__(
        self,
        backbone,
        tokenizer,
        config: SaeTrainConfig,
        out: str | Path,
        cache: StateCache | None = None,
        *,
        log: str = "none",
        log_every: int = 10,
        prefetch: bool | None = None,
        world: World | None = None,
    ) -> None:
        if log_every < 1:
            raise InputError(f"train-sae: log_every must be at least 1, got {log_every}")
        self.config, self.out = config, Path(out)
        self.world = World() if world is None else world
        self.backbone, self.device = backbone, backbone.device
        self.maker = WindowMaker(tokenizer, config.activations, config.context, config.chat)
        self.work = self.out / ".progress"
        self.stream = stream_of(
            self.world,
            backbone,
            self.maker.end_id,
            self.work / "states",
            config.chunk_states,
            cache,
            prefetch,
        )
        d_model = backbone.config.hidden_size
        self.k_aux = config.k_aux or min(max(1, d_model // 2), 512)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            # lives in standardised coordinates; drawn on the CPU: one seed, one SAE on any device
            sae = TopKSAE(d_model, config.n_latents, config.k, normalization="none")
        self.sae = shard_of(sae, self.world).to(self.device)
        self.mean, self.std = torch.zeros(d_model), torch.ones(d_model)
        self.optimizer = SaeOptimizer(
            self.sae, config.optimizer, config.clip, config.seed, self.world
        )
        self.learner = data_parallel(self.sae, self._loss, self.world)
        self.average = Average(self.sae, config.ema)
        self.firing = Firing(len(self.sae.latent_bias), self.device)
        self.moments = Moments(d_model, self.device)
        main = self.world.main
        self.log = MetricsLog(self.out, log, asdict(config)) if main else NoLog()
        self.log_every = log_every
        self.step = self.chunk = self.documents = self.states = self.tokens = 0
        self.seconds, self._started = 0.0, time.perf_counter()
        self.judged = 0  # the chunk that the report is about
        self.scored_states = 0  # of the corpus
        self.final: dict[str, float] = {}
        self._shown: dict[str, float] = {}

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
            on_survey, on_states, on_step: progress, see `Corpus`; on_step gets the step, of how
                many, and the metrics of the last log line.
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
        identity = self._identity(corpus)
        self.world.from_main(lambda: progress.claim(self.out, self.work, identity))
        on_survey(corpus)
        self.plan(corpus)
        progress.load(self)
        self.log.start(self.step)
        on_states(self.states)
        try:
            if self.states < corpus.states:
                self._learn_all(windows(), corpus, on_states, on_step)
        finally:
            self.log.close()
        origin = {"source": origin_of(self.backbone), "training": asdict(self.config)}
        whole = unsharded(self.average.sae)
        if self.world.main:
            save_sae(self.folded(whole), self.out, {**origin, **self.final})
        by_kind = {n[4:]: v for n, v in self.final.items() if n.startswith("fvu/")}
        return SaeReport(
            self.states,
            self.tokens,
            self.step,
            self.final["fvu"],
            self.final["normalized_mse"],
            self.final["dead"],
            self.seconds,
            self.final.get("alive_scored"),
            by_kind,
        )

    def plan(self, corpus: Corpus) -> None:
        """The schedule of a corpus, and which chunk the report is about."""
        batches = sum(math.ceil(states / self.config.batch_size) for states in corpus.chunks)
        passes = self.config.passes
        self.schedule = Schedule(self.config, batches * passes, corpus.states * passes)
        half = self.config.chunk_states / 2
        self.judged = max((i for i, n in enumerate(corpus.chunks) if n >= half), default=0)
        self.scored_states = corpus.scored

    def _identity(self, corpus: Corpus) -> dict:
        return {
            **asdict(self.config),
            "backbone": fingerprint(self.backbone),
            "corpus": f"{corpus.documents} documents, {corpus.tokens} tokens",
        }

    def _learn_all(self, windows, corpus: Corpus, on_states, on_step) -> None:
        self._started = time.perf_counter()
        chunks = self.stream.chunks(
            windows,
            documents_done=self.documents,
            limit=corpus.states - self.states,
            progress=on_states,
        )
        with contextlib.closing(chunks):  # also when a step fails: prefetch ends its thread
            for chunk in chunks:
                self.learn(chunk, on_step)
                self.chunk, self.documents = self.chunk + 1, chunk.documents
                self.states += len(chunk.states)
                self.tokens += chunk.tokens
                now = time.perf_counter()
                self.seconds, self._started = self.seconds + now - self._started, now
                progress.save(self)

    # ---- learning --------------------------------------------------------------------------

    def learn(self, chunk: Chunk, on_step: Callable[[dict[str, float]], None]) -> None:
        """All passes over a chunk."""
        if self.chunk == 0:
            self._look_at(chunk.states)
        for epoch in range(self.config.passes):
            order = shuffle(len(chunk.states), self.config.seed, self.chunk, epoch)
            for i, rows in enumerate(order.split(self.config.batch_size)):
                mine = rows[self.world.rows(len(rows))]
                self._step(self._standardized(chunk.states[mine]), chunk, rows)
                if self.step % self.log_every == 0 or self.step == self.schedule.total_steps:
                    done = epoch * len(chunk.states) + i * self.config.batch_size + len(rows)
                    self._log(chunk, done / len(chunk.states) / self.config.passes)
                on_step({**self._shown, "step": self.step, "of": self.schedule.total_steps})
        if not all(torch.isfinite(p).all() for p in self.sae.parameters()):
            raise InputError(
                f"train-sae: weights are not finite after step {self.step}{self._kept()}"
            )
        if self.chunk == self.judged:
            self.final = self._judge(chunk)

    def _look_at(self, states: Tensor) -> None:
        """What the first chunk tells: mean and deviation of each dimension, the pre-bias."""
        if self.config.standardize:
            self.mean = states.mean(0)
            self.std = states.std(0).clamp_min(1e-4)
        if self.config.pre_bias != "zero":
            median = self.config.pre_bias == "median"
            centre = geometric_median(states) if median else states.double().mean(0).float()
            with torch.no_grad():
                self.sae.pre_bias.copy_((centre - self.mean) / self.std)
        self.average.restart()

    def _standardized(self, states: Tensor) -> Tensor:
        return ((states - self.mean) / self.std).to(self.device)

    def _kept(self) -> str:
        return (
            f"; the checkpoint of chunk {self.chunk - 1} is kept in {self.work}"
            if self.chunk
            else ""
        )

    def _step(self, x: Tensor, chunk: Chunk, rows: Tensor) -> None:
        """One Adam step on `rows` of a chunk; x are those of this data rank, standardised."""
        if self.config.dead_latents == "resample" and self.schedule.resamples(self.step):
            self._resample(chunk)
        k = self.schedule.k(self.step)
        loss, squared, latents = self.learner(x, k, len(rows))
        lr = self.schedule.lr(self.step)
        (loss * self.world.data_ranks).backward()  # DDP averages, and this is a part of a sum
        norm = float(self.optimizer.gradient_norm())
        # looked at before the weights are touched: one wait for the GPU a step names the batch
        value = float(self.world.sum_data(loss.detach()))
        if not math.isfinite(value) or not math.isfinite(norm):
            what = f"loss is {value}" if not math.isfinite(value) else f"gradient's norm is {norm}"
            raise InputError(
                f"train-sae: the {what} at step {self.step} (chunk {self.chunk}, documents "
                f"{self.documents + 1} to {chunk.documents}){self._kept()}"
            )
        self.optimizer.step(lr)
        self.step += 1
        self.average.update(self.step)
        self._count(self.moments, self.firing, x, squared, latents, chunk, rows)
        self._shown |= {"loss": value, "learning_rate": lr, "grad_norm": norm, "k": k}

    def _count(self, moments: Moments, firing: Firing, x, squared, latents, chunk, rows) -> None:
        """Take this data rank's share of a batch into the sums, and all of it into `firing`."""
        is_scored = chunk.kinds[rows] == POSITIONS.index(SCORED)
        mine = self.world.rows(len(rows))
        scored, kinds = is_scored[mine].to(self.device), chunk.kinds[rows[mine]].to(self.device)
        firing.update(latents.idx, latents.vals, scored, int(is_scored.sum()), len(rows))
        firing.last = self.world.max_data(firing.last)
        firing.last_scored = self.world.max_data(firing.last_scored)
        moments.add(x, squared, kinds, latents.vals)

    def _loss(self, x: Tensor, k: int, n: int) -> tuple[Tensor, Tensor, SparseLatents]:
        """(loss, each row's squared error, the k active latents) of rows of a batch of n.

        The loss is these rows' part of a sum over data ranks that is the batch's mean.
        """
        sae = self.sae
        widest = min(MULTI * k, sae.n_latents) if self.config.multi_topk else k
        many = sae.encode_normalized(x, widest)
        latents = narrowed(many, k)
        energy = x.square().sum(1).clamp_min(1e-12)
        error = x - sae.decode(latents)
        squared = error.square().sum(1)
        loss = (squared / energy).sum() / n
        if widest > k:
            more = (sae.decode(many) - x).square().sum(1)
            loss = loss + MULTI_WEIGHT * (more / energy).sum() / n
        if self.config.dead_latents == "auxk":
            dead = self.firing.dead(self.schedule.dead_after)
            aux = auxk_loss(sae, x, error.detach(), dead, self.k_aux, self.world)
            loss = loss + self.config.aux_weight * aux
        vals, idx = latents.vals.detach(), latents.idx
        return loss, squared.detach(), SparseLatents(vals, idx)

    @torch.no_grad()
    def _resample(self, chunk: Chunk) -> None:
        dead = self.firing.dead(self.schedule.dead_after)
        generator = generator_of(self.config.seed, "resample", self.step)
        some = torch.randperm(len(chunk.states), generator=generator)[:CANDIDATES]
        x = self._standardized(chunk.states[some])
        residual = x - self.sae.decode(self.sae.encode_normalized(x))
        rows = resample(self.sae, dead, x, residual, generator, self.world)
        self.optimizer.forget(rows)
        self.average.restart(rows)
        self.firing.last[rows] = self.firing.seen
        count = int(self.world.sum_latents(torch.tensor(len(rows))))
        self._shown["resampled"] = self._shown.get("resampled", 0) + count

    # ---- measuring -------------------------------------------------------------------------

    def _log(self, chunk: Chunk, share: float) -> None:
        """A line of metrics; `share` of the chunk has been learnt."""
        seconds = self.seconds + time.perf_counter() - self._started
        tokens = self.tokens + chunk.tokens * share
        left = self.schedule.total_steps - self.step
        self._shown |= self.moments.over(self.world).report()
        self._shown |= {
            "epoch": self.step / self.schedule.total_steps,
            "num_input_tokens_seen": round(tokens),
            "dead": self._share(self.firing.dead(self.schedule.dead_after)),
        }
        if self.firing.seen_scored:
            window = self.scored_states or self.firing.seen_scored
            alive = self.firing.alive_scored(window)
            self._shown["alive_scored"] = self.world.mean_latents(alive)
        if seconds > 0:
            self._shown |= {
                "tokens_per_second": tokens / seconds,
                "eta_seconds": seconds / self.step * left,
            }
        self.log.write({"step": self.step, **self._shown})
        self.moments = Moments(self.sae.d_model, self.device)

    @torch.inference_mode()
    def _judge(self, chunk: Chunk) -> dict[str, float]:
        """FVU, dead and alive latents over a chunk with the weights that are saved."""
        sae = self.average.sae
        moments = Moments(sae.d_model, self.device)
        firing = Firing(len(sae.latent_bias), self.device)
        for rows in torch.arange(len(chunk.states)).split(max(1024, self.config.batch_size)):
            x = self._standardized(chunk.states[rows[self.world.rows(len(rows))]])
            latents = sae.encode_normalized(x)
            squared = (sae.decode(latents) - x).square().sum(1)
            self._count(moments, firing, x, squared, latents, chunk, rows)
        found = moments.over(self.world).report()
        found["dead"] = self._share(firing.last == 0)
        alive = None
        if firing.seen_scored:
            alive = firing.alive_scored(firing.seen_scored)
        elif self.firing.seen_scored:  # the conversations were in earlier chunks
            alive = self.firing.alive_scored(self.scored_states)
        if alive is not None:
            found["alive_scored"] = self.world.mean_latents(alive)
        return found

    def _share(self, latents: Tensor) -> float:
        """The share of all latents that are True in a shard's (n_local,) bool."""
        return self.world.mean_latents(float(latents.float().mean()))

    # ---- saving ----------------------------------------------------------------------------

    @torch.no_grad()
    def folded(self, whole: TopKSAE | None = None) -> TopKSAE:
        """The SAE in published coordinates: standardisation folded into its parameters, exactly.

        whole: the averaged SAE where its latents are spread over processes.

        z = W ((x - m) / s - b) + c = (W / s) (x - (m + s b)) + c;  x' = (s D) z + (m + s b).
        """
        inner, mean, std = whole or self.average.sae, self.mean.double(), self.std.double()
        sae = TopKSAE(inner.d_model, inner.n_latents, inner.k, normalization="token")
        sae.encoder.weight.copy_(inner.encoder.weight.cpu().double() / std)
        sae.decoder.weight.copy_(inner.decoder.weight.cpu().double() * std[:, None])
        sae.pre_bias.copy_(mean + std * inner.pre_bias.cpu().double())
        sae.latent_bias.copy_(inner.latent_bias.cpu())
        return sae.eval()


def shuffle(count: int, seed: int, chunk: int, epoch: int) -> Tensor:
    """The order in which a chunk's states are learnt from: the same in every process."""
    return torch.randperm(count, generator=generator_of(seed, chunk, epoch))


def generator_of(*names: int | str) -> torch.Generator:
    """A generator that depends on the names alone: nothing of it has to be saved."""
    text = "/".join(map(str, names))
    digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
