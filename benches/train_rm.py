"""Suite `train-rm`: reward-model training end to end, against the published way of writing it.

Published (`sarm.training.reference`): a pair at a time, chosen and rejected padded to the longer,
every token through the whole backbone and a dense SAE, gradient checkpointing, 4,096 tokens at most
- the settings of the released training code. `published, no checkpointing`: the same without it.
sarm: the same pair packed with its prompt once, the last layer and the SAE for the needed tokens
only, sparse latents, layers' backward pass written out, checkpointing where a pair has more than
KEPT_TOKENS. All: fp32 (and published in bf16, where --dtype has it), modes 1 and 3, steps of 8
pairs, AdamW, gradient clipping, the same first weights. How many pairs: `--pairs`.

SmolLM2-135M-Instruct cut at 15 layers, n_latents 9,216, k 27, random SAE and head (they do not
change the time). Data: preferences_train.jsonl.gz (--data or $SARM_DATA), a random sample or the
`--shortest` pairs, else those of the demo. The ways take turns step by step, so that whatever else
the machine does hits all of them. The note says how far the loss curves are apart. Memory: the
peak of a step on the longest pair, each way in a process of its own, beyond weights and optimiser
state, and in the note the total with them.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import charts
import torch
from measure import quantile, ratio, sample
from memory import peak_on_cpu, peak_on_cuda
from suite import DTYPES, BenchError, Options, Row
from torch import Tensor
from workload import make_scorer

from sarm import SarmForSequenceClassification, SARMScorer
from sarm.data import PreferencePair, read_preferences
from sarm.demo.run import shipped_pairs
from sarm.packing.differentiable import packed_attention
from sarm.tokens import ConversationEncoder
from sarm.training.collate import EncodedPair, PairDataset, collate
from sarm.training.end_to_end import checkpointed
from sarm.training.modes import PairModel
from sarm.training.reference import published_loss

BATCH = 8
MODES = (1, 3)
PUBLISHED, KEPT, SARM = "published", "published, no checkpointing", "sarm"
WAYS = ((PUBLISHED, "fp32"), (KEPT, "fp32"), (PUBLISHED, "bf16"), (SARM, "fp32"))
KEPT_TOKENS = 1024
LR = 4e-6
MIB = 2**20

Batch = list[EncodedPair]
Batches = list[Batch]


def run(options: Options) -> list[Row]:
    """Each way in each mode."""
    cases = {f"mode {mode}": mode for mode in MODES}
    rows = []
    scorer = None
    for case, mode in cases.items():
        ways = [w for w in WAYS if w[1] in options.dtypes and options.wants(case, w[0])]
        if not ways:
            continue
        scorer = scorer or make_scorer(options.device, torch.float32)
        title, batches = make_batches(scorer, options, mode)
        options.log(f"{case}  {title}")
        found = compare(case, title, scorer.model, batches, mode, ways, options)
        if options.memory:
            for row in found:
                add_memory(row, mode, batches, options, scorer)
        rows += found
    if not rows:
        raise BenchError(f"--only {options.only!r} selects nothing; cases: {', '.join(cases)}")
    return rows


def make_batches(scorer: SARMScorer, options: Options, mode: int) -> tuple[str, Batches]:
    """(what they are, pairs in batches)."""
    file = options.data / "preferences_train.jsonl.gz" if options.data else None
    if file is not None and file.is_file():
        source, pairs = file.name, list(read_preferences(file))
    else:
        source, pairs = "demo pairs", shipped_pairs()
    if options.shortest:
        pairs = sorted(pairs, key=characters)[: options.pairs]
    pairs = random.Random(0).sample(pairs, min(options.pairs, len(pairs)))
    encoder = ConversationEncoder(scorer.tokenizer, options.max_length)
    data = PairDataset(pairs, encoder, scorer.model.config.vocab_size, turns=mode >= 2)
    batches = [data.pairs[i : i + BATCH] for i in range(0, len(data), BATCH)]
    tokens = sum(len(ids) for pair in data.pairs for ids in pair.ids)
    return f"{source}, {len(data)} pairs, {tokens} tokens, at most {options.max_length}", batches


def characters(pair: PreferencePair) -> int:
    """Of the longer side."""
    return max(sum(len(m["content"]) for m in side) for side in (pair.chosen, pair.rejected))


def compare(
    case: str,
    title: str,
    model: SarmForSequenceClassification,
    batches: Batches,
    mode: int,
    ways: list[tuple[str, str]],
    options: Options,
) -> list[Row]:
    """A row for each way; every run is an epoch over the same weights as the others'."""
    shortest = min(batches, key=lambda batch: sum(len(ids) for p in batch for ids in p.ids))
    times: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    losses: dict[tuple[str, str], list[float]] = {}
    for turn in range(options.runs):
        with contextlib.ExitStack() as stack:
            steps = {w: stack.enter_context(training(*w, model, mode)) for w in ways}
            for way in ways if turn == 0 else ():  # fills the libraries' buffers
                with training(*way, model, mode) as step:
                    step(shortest[:1])
            spent = dict.fromkeys(ways, 0.0)
            losses = {way: [] for way in ways}
            for i, batch in enumerate(batches):
                for way in ways[i % len(ways) :] + ways[: i % len(ways)]:
                    keep = functools.partial(_append, losses[way], steps[way], batch)
                    spent[way] += sample(keep, options.device, 1)
                done = ", ".join(f"{' '.join(w)} {s / 1e3:.1f} s" for w, s in spent.items())
                options.log(f"  {i + 1}/{len(batches)} steps: {done}")
            for way in ways:
                times[way].append(spent[way])
    pairs = sum(map(len, batches))
    rows = []
    for way in ways:
        runs = times[way]
        row = Row(case, title, way[1], way[0], *(quantile(runs, q) for q in (0.5, 0.2, 0.8)))
        row.note = f"{1e3 * pairs / quantile(runs, 0.5):.2f} pairs/s"
        for name in (PUBLISHED, KEPT):
            if (name, "fp32") in times and way != (name, "fp32"):
                row.ratios[name] = ratio(runs, times[name, "fp32"])
        if (PUBLISHED, "fp32") in losses and way != (PUBLISHED, "fp32"):
            both = zip(losses[way], losses[PUBLISHED, "fp32"], strict=True)
            row.note += f", losses within {max(abs(a - b) / abs(b) for a, b in both):.0e}"
        rows.append(row)
    return rows


def _append(losses: list[float], step: Callable[[Batch], float], batch: Batch) -> None:
    losses.append(step(batch))


@contextlib.contextmanager
def training(
    way: str, dtype: str, model: SarmForSequenceClassification, mode: int
) -> Iterator[Callable[[Batch], float]]:
    """Trains a copy of the model; yields a step, which returns its loss."""
    model = copy.deepcopy(model).to(DTYPES[dtype]).train()
    pairs = PairModel(model, mode, kept_tokens=KEPT_TOKENS if way == SARM else None)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=LR, fused=True)  # the Trainer's

    def sparse(pair: EncodedPair) -> Tensor:
        inputs = collate([pair])
        return pairs(inputs["margins"].to(model.device), inputs["batch"])["loss"]

    def dense(pair: EncodedPair) -> Tensor:
        return published_loss(model, [pair], mode)[0]

    loss_of = sparse if way == SARM else dense

    def step(batch: Batch) -> float:
        total = 0.0
        for pair in batch:
            loss = loss_of(pair) / len(batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    packed = packed_attention(model.model) if way == SARM else contextlib.nullcontext()
    with checkpointed(model.model, way != KEPT), packed:
        yield step


def add_memory(row: Row, mode: int, batches: Batches, options: Options, scorer: SARMScorer) -> None:
    """Peak of a step on the longest pair."""
    longest = max((p for b in batches for p in b), key=lambda pair: max(map(len, pair.ids)))
    if options.device == "cuda":
        with training(row.name, row.dtype, scorer.model, mode) as step:
            step([longest])
            row.peak_mib = peak_on_cuda(functools.partial(step, [longest]))
    else:
        row.peak_mib = peak_on_cpu(_step, row.name, row.dtype, mode, longest)
    if row.peak_mib is not None:
        held = sum(
            p.numel() * DTYPES[row.dtype].itemsize * (3 if p.requires_grad else 1)  # Adam keeps two
            for p in scorer.model.parameters()
        )
        row.note += f", {row.peak_mib + held / MIB:.0f} MiB in all"


def _step(way: str, dtype: str, mode: int, pair: EncodedPair) -> Callable[[], float]:
    opened = contextlib.ExitStack()
    atexit.register(opened.close)  # the process ends with the call
    model = make_scorer("cpu", torch.float32).model
    return functools.partial(opened.enter_context(training(way, dtype, model, mode)), [pair])


def plot(rows: list[Row], path: Path) -> None:
    """Bars: time over the published way's."""
    charts.bars(rows, [PUBLISHED], path)
