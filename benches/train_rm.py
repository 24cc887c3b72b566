"""Suite `train-rm`: reward-model training end to end, against the published way of writing it.

Published (`sarm.training.reference`): a pair at a time, chosen and rejected padded to the longer,
every token through the whole backbone and a dense SAE, gradient checkpointing, 4,096 tokens at
most (the settings of the released training code). `published, no checkpointing`: the same without
it. sarm: the same pair (or `--micro-batch` of them) packed, prompts once, the last layer and the
SAE for the needed tokens only, sparse latents, layers' backward pass written out, checkpointing
where a pair has more than KEPT_TOKENS. All: fp32 (and published in bf16, where --dtype has it),
modes 1 and 3, steps of 8 pairs, AdamW, gradient clipping, the same first weights. How many pairs:
`--pairs`.

SmolLM2-135M-Instruct cut at 15 layers, n_latents 9,216, k 27, random SAE and head (they do not
change the time). Data: preferences_train.jsonl.gz (--data or $SARM_DATA), a random sample or the
`--shortest` pairs, else those of the demo. The ways take turns step by step, so that whatever else
the machine does hits all of them. The note says how far the loss curves are apart.

Memory, in cases of its own and each way in a process of its own: the peak of a step of the shortest
pair, whose gradients are there then as in any step of several pairs, and another one: the longest
of 1,000 pairs, which is an epoch's peak, or one of median length. Extra MiB are gradients and
activations; the note has the total with weights and optimiser state, which all ways need.
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
from sarm.training.allocator import return_big_blocks
from sarm.training.collate import EncodedPair, PairDataset, collate
from sarm.training.end_to_end import checkpointed
from sarm.training.modes import PairModel
from sarm.training.reference import published_loss

BATCH = 8
MODES = (1, 3)
PUBLISHED, KEPT, SARM = "published", "published, no checkpointing", "sarm"
WAYS = ((PUBLISHED, "fp32"), (KEPT, "fp32"), (PUBLISHED, "bf16"), (SARM, "fp32"))
KEPT_TOKENS = 1024
PAIRS, MEMORY_PAIRS = ("longest", "typical"), 1000
LR = 4e-6
MIB = 2**20

Batch = list[EncodedPair]
Batches = list[Batch]


def run(options: Options) -> list[Row]:
    """Each way in each mode."""
    times = {f"mode {mode}": mode for mode in MODES}
    peaks = {f"mode {mode}, {which} pair": (mode, which) for mode in MODES for which in PAIRS}
    scorer = make_scorer(options.device, torch.float32)
    rows = []
    for case, mode in times.items():
        if ways := wanted_ways(case, options):
            title, pairs = sample_pairs(scorer, options, mode, options.pairs)
            batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
            options.log(f"{case}  {title}")
            rows += compare(case, title, scorer.model, batches, mode, ways, options)
    for case, (mode, which) in peaks.items() if options.memory else ():
        if ways := wanted_ways(case, options):
            _, pairs = sample_pairs(scorer, options, mode, MEMORY_PAIRS)
            pairs.sort(key=lambda pair: (max(map(len, pair.ids)), sum(map(len, pair.ids))))
            step = [pairs[0], pairs[-1 if which == "longest" else len(pairs) // 2]]
            rows += peaks_of(case, scorer, step, mode, ways, options)
    if not rows:
        raise BenchError(
            f"--only {options.only!r} selects nothing; cases: {'; '.join((*times, *peaks))}"
        )
    return rows


def wanted_ways(case: str, options: Options) -> list[tuple[str, str]]:
    """What --dtype and --only leave of the ways."""
    return [way for way in WAYS if way[1] in options.dtypes and options.wants(case, way[0])]


def sample_pairs(
    scorer: SARMScorer, options: Options, mode: int, count: int
) -> tuple[str, list[EncodedPair]]:
    """(what they are, pairs)."""
    file = options.data / "preferences_train.jsonl.gz" if options.data else None
    if file is not None and file.is_file():
        source, pairs = file.name, list(read_preferences(file))
    else:
        source, pairs = "demo pairs", shipped_pairs()
    if options.shortest:
        pairs = sorted(pairs, key=characters)[:count]
    pairs = random.Random(0).sample(pairs, min(count, len(pairs)))
    encoder = ConversationEncoder(scorer.tokenizer, options.max_length)
    data = PairDataset(pairs, encoder, scorer.model.config.vocab_size, turns=mode >= 2)
    tokens = sum(len(ids) for pair in data.pairs for ids in pair.ids)
    title = f"{source}, {len(data)} pairs, {tokens} tokens, at most {options.max_length}"
    return title, data.pairs


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
            steps = {
                w: stack.enter_context(training(*w, model, mode, options.micro_batch)) for w in ways
            }
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
    way: str, dtype: str, model: SarmForSequenceClassification, mode: int, micro_batch: int = 1
) -> Iterator[Callable[[Batch], float]]:
    """Trains a copy of the model; yields a step, which returns its loss.

    micro_batch: pairs that sarm packs into one pass.
    """
    model = copy.deepcopy(model).to(DTYPES[dtype]).train()
    pairs = PairModel(model, mode, kept_tokens=KEPT_TOKENS if way == SARM else None)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=LR, fused=True)  # the Trainer's

    def sparse(some: Batch) -> Tensor:
        inputs = collate(some)
        return pairs(inputs["margins"].to(model.device), inputs["batch"])["loss"]

    def dense(some: Batch) -> Tensor:
        return published_loss(model, some, mode)[0]

    loss_of, at_once = (sparse, micro_batch) if way == SARM else (dense, 1)

    def step(batch: Batch) -> float:
        total = 0.0
        for i in range(0, len(batch), at_once):
            some = batch[i : i + at_once]
            loss = loss_of(some) * len(some) / len(batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    packed = packed_attention(model.model) if way == SARM else contextlib.nullcontext()
    with checkpointed(model.model, way != KEPT), packed:
        yield step


def peaks_of(
    case: str,
    scorer: SARMScorer,
    step: list[EncodedPair],
    mode: int,
    ways: list[tuple[str, str]],
    options: Options,
) -> list[Row]:
    """A row for each way, without a time."""
    chosen, rejected = (len(ids) for ids in step[-1].ids)
    title = f"a pair of {chosen} and {rejected} tokens"
    rows = []
    totals: dict[tuple[str, str], float] = {}
    for name, dtype in ways:
        row = Row(case, title, dtype, name)
        if options.device == "cuda":
            with training(name, dtype, scorer.model, mode) as run:
                run(step[:1])
                row.peak_mib = peak_on_cuda(functools.partial(run, step))
        else:
            row.peak_mib = peak_on_cpu(_step, name, dtype, mode, step)
        rows.append(row)
        if row.peak_mib is None:
            continue
        total = totals[name, dtype] = row.peak_mib + held_mib(scorer.model, mode, dtype)
        row.note = f"{total:.0f} MiB in all"
        if (PUBLISHED, "fp32") in totals:
            row.note += f", {100 * total / totals[PUBLISHED, 'fp32']:.0f} % of published"
        options.log(f"  {case}, {name}, {dtype}: {row.peak_mib:.0f} MiB, {row.note}")
    return rows


def held_mib(model: SarmForSequenceClassification, mode: int, dtype: str) -> float:
    """Weights, and the two numbers that Adam keeps of each that learns."""
    PairModel(model, mode)  # sets requires_grad
    numbers = sum(p.numel() * (3 if p.requires_grad else 1) for p in model.parameters())
    return numbers * DTYPES[dtype].itemsize / MIB


def _step(way: str, dtype: str, mode: int, step: list[EncodedPair]) -> Callable[[], float]:
    """The first call, before the measured one, makes Adam's state with the short pair alone."""
    if way == SARM:
        return_big_blocks()  # as `train_pairs` does
    opened = contextlib.ExitStack()
    atexit.register(opened.close)  # the process ends with the measured call
    run = opened.enter_context(training(way, dtype, make_scorer("cpu", torch.float32).model, mode))
    calls = iter([step[:1], step])
    return lambda: run(next(calls))


def plot(rows: list[Row], path: Path) -> None:
    """Bars: time over the published way's."""
    charts.bars(rows, [PUBLISHED], path)
