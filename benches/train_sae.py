"""Suite `train-sae`: text to learnt SAE, backbone included, against the published formula.

Published: padded batches of 8 windows in the corpus's order through the transformers backbone (in
bf16; where a CPU has no bf16 instructions fp32 is faster, so both are timed), then a dense SAE:
all pre-activations, TopK, a dense z, a dense decoder, Adam, decoder rows put back to unit length
every 10th step. sarm: packed windows, the last layer for the read tokens only (fp32, and 8 bits),
then the sparse step of `SaeTrainer`. Both learn by the published loss from published-normalised
states in the same order, from the same weights, without AuxK, clipping or averaging: the losses
after equal numbers of tokens stand beside each other. Writing checkpoints is timed for neither.

Cases: the ends of sentences, as published, and every token, over n_latents. SmolLM2-135M-Instruct
cut at 15 layers, k 27. Text: text_chat_answers.jsonl.gz (--data or $SARM_DATA), its first
`--documents`, else the demo's answers.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import charts
import torch
from baselines import published_dense
from measure import measure, ratio
from ops import timing_rows
from suite import DTYPES, BenchError, Missing, Options, Row
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from workload import LAYERS, K

from sarm.backbone import load_backbone, load_tokenizer
from sarm.data import BadRecords, read_texts
from sarm.demo.fetch import smollm2
from sarm.demo.run import shipped_pairs
from sarm.sae import TopKSAE, normalize_tokens
from sarm.training.activations import Window, WindowMaker
from sarm.training.sae import SaeTrainConfig, SaeTrainer, shuffle
from sarm.training.sae.schedule import Schedule
from sarm.training.stream import survey

BATCH = 8  # windows, as published
CONTEXT = 1024
STATES = {"sentence": 64, "token": 512}  # kind of position -> states a step
N_LATENTS = (2304, 9216, 36864)
BASE = 9216  # where the pipeline in bf16 and the sentences are timed
PARTS = 4  # of the corpus, after each of which the loss is shown
PUBLISHED = "published"
SARM = ("sarm fp32", "sarm int8")


def run(options: Options) -> list[Row]:
    """Sentence ends at one size, every token over n_latents."""
    points = [("sentence", BASE), *(("token", n) for n in N_LATENTS)]
    names = [*(f"{PUBLISHED} {dtype}" for dtype in options.dtypes), *SARM]
    wanted = [p for p in points if any(options.wants(case_of(p[0]), name) for name in names)]
    if not wanted:
        cases = ", ".join(dict.fromkeys(case_of(kind) for kind, _ in points))
        raise BenchError(
            f"--only {options.only!r} selects nothing; cases: {cases}; "
            f"candidates: {', '.join(names)}"
        )
    path = smollm2()
    load = functools.partial(load_backbone, path, LAYERS, device=options.device)
    backbones = {
        **{f"{PUBLISHED} {d}": load(dtype=DTYPES[d]) for d in options.dtypes},
        "sarm fp32": load(dtype=torch.float32),
        "sarm int8": int8(load),
    }
    source, texts = documents(options)
    rows = []
    for kind, n_latents in wanted:
        config = published_config(kind, n_latents, K)
        chosen = {
            name: backbone
            for name, backbone in backbones.items()
            if options.wants(case_of(kind), name) and (n_latents == BASE or "bf16" not in name)
        }
        rows += compare(source, texts, load_tokenizer(path), chosen, config, options)
    return rows


def case_of(kind: str) -> str:
    return f"train-sae, {kind}"


def int8(load: Callable[..., Any]) -> Any:
    """The 8-bit backbone, or why there is none."""
    try:
        return load(quantization="int8")
    except Exception as error:  # a machine without the kernels
        return Missing(str(error))


def documents(options: Options) -> tuple[str, list[str]]:
    """(source, texts)."""
    file = options.data / "text_chat_answers.jsonl.gz" if options.data else None
    if file is None or not file.is_file():
        answers = [str(pair.chosen[-1]["content"]) for pair in shipped_pairs()]
        return "demo answers", answers[: options.documents]
    found = read_texts(str(file), BadRecords(skip=False), "text")
    return file.name, [text for _, text in itertools.islice(found, options.documents)]


def published_config(kind: str, n_latents: int, k: int) -> SaeTrainConfig:
    """What both learn by; one chunk, so that both see the states in one order."""
    return SaeTrainConfig(
        n_latents=n_latents,
        k=k,
        activations=kind,
        context=CONTEXT,
        batch_size=STATES[kind],
        chunk_states=1 << 30,
        standardize=False,
        pre_bias="zero",
        dead_latents="none",
        clip=None,
        ema=0.0,
    )


def compare(
    source: str,
    texts: Sequence[str],
    tokenizer: Any,
    backbones: dict[str, Any],
    config: SaeTrainConfig,
    options: Options,
) -> list[Row]:
    """A row for each pipeline."""
    maker = WindowMaker(tokenizer, config.activations, config.context)
    corpus = survey(maker.windows(texts), None, config.chunk_states)
    title = (
        f"{source}, {len(texts)} documents, {corpus.tokens} tokens, {corpus.states} states, "
        f"n_latents {config.n_latents}"
    )
    case = case_of(config.activations)
    options.log(f"{case}  {title}")
    candidates: dict[str, Callable[[], list[float]] | Missing] = {}
    for name, backbone in backbones.items():
        way = published if name.startswith(PUBLISHED) else sparse
        candidates[name] = (
            backbone
            if isinstance(backbone, Missing)
            else functools.partial(way, backbone, tokenizer, texts, config)
        )
    losses: dict[str, list[float]] = {}

    def kept(name: str, call: Callable[[], list[float]]) -> None:
        losses[name] = call()

    timed = {
        name: call if isinstance(call, Missing) else functools.partial(kept, name, call)
        for name, call in candidates.items()
    }
    times, failed = measure(timed, options.device, options.runs)
    table = timing_rows(case, title, "", list(candidates), times, failed)
    for row in table:
        if row.ms is None:
            continue
        row.accuracy["tokens_per_s"] = 1e3 * corpus.tokens / row.ms
        row.accuracy |= curve(losses[row.name])
        row.note = f"{row.accuracy['tokens_per_s']:.0f} tokens/s"
        if not row.name.startswith(PUBLISHED):
            row.ratios = {
                n: ratio(times[row.name], times[n]) for n in times if n.startswith(PUBLISHED)
            }
            faster = [f"{1 / r.value:.2f}x {n}" for n, r in row.ratios.items()]
            row.note = ", ".join([row.note, *faster])
        row.note += ", loss " + " ".join(f"{v:.4f}" for v in curve(losses[row.name]).values())
    return table


def curve(losses: list[float]) -> dict[str, float]:
    """The mean loss of each quarter of the steps."""
    found = {}
    for part in range(PARTS):
        some = losses[part * len(losses) // PARTS : (part + 1) * len(losses) // PARTS]
        if some:
            found[f"loss, quarter {part + 1}"] = sum(some) / len(some)
    return found


def sparse(
    backbone: Any, tokenizer: Any, texts: Sequence[str], config: SaeTrainConfig
) -> list[float]:
    """The losses of every step of sarm's own trainer."""
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = SaeTrainer(backbone, tokenizer, config, folder, log_every=1 << 30)
        trainer.plan(survey(trainer.maker.windows(texts), None, config.chunk_states))
        trainer.judged = -1  # the report's pass over a chunk is there once a run, not per token
        for chunk in trainer.stream.chunks(trainer.maker.windows(texts)):
            trainer.learn(chunk, lambda metrics: losses.append(metrics["loss"]))
    return losses


def published(
    backbone: Any, tokenizer: Any, texts: Sequence[str], config: SaeTrainConfig
) -> list[float]:
    """The same by the published formula; the SAE's weights and Adam are fp32."""
    maker = WindowMaker(tokenizer, config.activations, config.context)
    windows = [window for found in maker.windows(texts) for window in found]
    batches = [windows[i : i + BATCH] for i in range(0, len(windows), BATCH)]
    x = torch.cat([padded_states(backbone, batch) for batch in batches])
    steps = -(-len(x) // config.batch_size)
    schedule = Schedule(config, steps, len(x))
    torch.manual_seed(config.seed)
    d_model = backbone.config.hidden_size
    sae = TopKSAE(d_model, config.n_latents, config.k, normalization="none").to(backbone.device)
    adam = torch.optim.Adam(sae.parameters())
    losses = []
    for step, rows in enumerate(shuffle(len(x), config.seed, 0, 0).split(config.batch_size)):
        batch = x[rows.to(x.device)]
        rebuilt = published_dense(
            batch, sae.encoder.weight, sae.latent_bias, sae.w_dec, sae.pre_bias, config.k
        )
        loss = ((rebuilt - batch).square().sum(1) / batch.square().sum(1)).mean()
        loss.backward()
        for group in adam.param_groups:
            group["lr"] = schedule.lr(step)
        adam.step()
        adam.zero_grad()
        if step % 10 == 9:
            with torch.no_grad():
                rows_of = sae.w_dec
                rows_of /= rows_of.norm(dim=1, keepdim=True)
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def padded_states(backbone: Any, windows: Sequence[Window]) -> Tensor:
    """(states read of all windows, d_model) fp32, per-token normalised."""
    ids = pad_sequence([torch.tensor(w.ids) for w in windows], batch_first=True)
    mask = pad_sequence([torch.ones(len(w.ids), dtype=torch.long) for w in windows], True)
    hidden = backbone(
        input_ids=ids.to(backbone.device), attention_mask=mask.to(backbone.device), use_cache=False
    ).last_hidden_state
    states = [hidden[i, w.positions] for i, w in enumerate(windows)]
    return normalize_tokens(torch.cat(states).float())


def plot(rows: list[Row], path: Path) -> None:
    """Tokens a second over n_latents, a panel for each kind of position."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if "tokens_per_s" in row.accuracy:
            size = int(row.shape.rsplit(" ", 1)[1])
            lines = panels.setdefault(f"{row.case} over n_latents", {})
            lines.setdefault(row.name, []).append((size, row.accuracy["tokens_per_s"]))
    charts.lines(panels, path, ylabel="tokens/s", linear=False)
