"""Suite `agreement`: what bf16 and 8 bits change in states, rewards and verdicts, against fp32.

Of every conversation the state of its scored token, normalised as the SAE sees it: mean relative
error, and the mean of Spearman's rank correlations of PROBES random linear scores of it, which
speaks of the backbone alone. Its reward: Spearman's correlation with fp32's; TopK and head add to
that what they make of a state that is a little different. The benchmark's own accuracy (RM-Bench:
mean of easy, normal and hard; preferences: pairs) and its difference from fp32's in points, with
the 95 % interval of a bootstrap over prompts. bf16 means backbone and SAE; on a CPU without bf16
instructions a backbone of fp32 sums, rounded after every step (rounded.py); in 8 bits the SAE keeps
its dtype.

And how much a state depends on its batch: the largest relative difference of ALONE states, alone
and in the packing.

Model: --model, else SmolLM2-135M-Instruct cut at 15 layers with a random SAE and head, whose TopK
hangs on smaller differences than a trained one's. Data: RM-Bench chat and preferences_valid (--data
or $SARM_DATA), --items of each, else the demo's pairs; --max-length tokens of a conversation.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import charts
import torch
from scipy.stats import spearmanr
from suite import BenchError, Missing, Options, Row
from torch import Tensor
from workload import benchmarks, in_bf16, in_int8, make_scorer

from sarm import SARMScorer
from sarm.evaluation.metrics import Benchmark, evaluate
from sarm.packing import last_states
from sarm.sae import normalize_tokens

CASE = "agreement"
PROBES = 64
ALONE = 16  # rows that also run alone
EXACT, HALF, INT8 = "sarm fp32", "sarm bf16", "sarm int8"


def run(options: Options) -> list[Row]:
    """A row for each data set and precision."""
    if not any(options.wants(CASE, name) for name in (EXACT, HALF, INT8)):
        raise BenchError(f"--only {options.only!r} selects nothing; the one case is {CASE}")
    scorer = make_scorer(options.device, torch.float32, options.model, options.max_length)
    scorers: dict[str, SARMScorer | Missing] = {EXACT: scorer}
    for name, make in (
        (HALF, lambda: in_bf16(scorer)),
        (INT8, lambda: in_int8(scorer)),
    ):
        if options.wants(CASE, name):
            scorers[name] = make()
    table = []
    for benchmark in benchmarks(options):
        table += compare(benchmark, scorers, options)
    return table


def compare(
    benchmark: Benchmark, scorers: dict[str, SARMScorer | Missing], options: Options
) -> list[Row]:
    """The first scorer is what the others are compared with."""
    talks = [talk for item in benchmark.items for talk in item.conversations]
    exact = next(iter(scorers.values()))
    ids = [encoded.ids for encoded in exact.encode(talks)]
    shape = f"{benchmark.name}, {len(benchmark.items)} items, {len(ids)} rows"
    states: dict[str, Tensor] = {}
    rewards: dict[str, Tensor] = {}
    rows = []
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(exact.model.sae.d_model, PROBES, generator=generator)
    for name, scorer in scorers.items():
        if isinstance(scorer, Missing):
            rows.append(Row(CASE, shape, "", name, note=str(scorer)))
            continue
        options.log(f"{CASE}  {shape}  {name}")
        raw = last_states(scorer.model.model, ids)
        states[name] = normalize_tokens(raw)
        with torch.inference_mode():
            logits = scorer.model.from_states(raw.to(scorer.model.device)).logits
        rewards[name] = logits[:, 0].float().cpu()
        main = evaluate(benchmark, {n: r.tolist() for n, r in rewards.items()})[0]
        accuracy = main.scores[name].estimate.value
        row = Row(CASE, shape, "", name, accuracy={"accuracy_percent": 100 * accuracy})
        row.accuracy["packing_error"] = packing_error(scorer.model.model, ids[:ALONE], raw[:ALONE])
        rows.append(row)
        if name == EXACT:
            row.note = f"accuracy {100 * accuracy:.1f} %, {packing_note(row.accuracy)}"
            continue
        row.accuracy["state_error"] = relative_error(states[name], states[EXACT])
        linear = (states[n] @ probes for n in (name, EXACT))
        row.accuracy["spearman_probes"] = spearman(*linear)
        row.accuracy["spearman"] = spearman(rewards[name], rewards[EXACT])
        points = main.scores[name].difference  # from the first, which is exact
        assert points is not None
        row.accuracy["points"] = 100 * points.value
        row.accuracy["points_low"] = 100 * points.low
        row.accuracy["points_high"] = 100 * points.high
        if HALF in states and name != HALF:
            of_half = row.accuracy["state_error"] / relative_error(states[HALF], states[EXACT])
            row.accuracy["error_over_bf16"] = of_half
        row.note = note(row.accuracy)
    return rows


def note(found: dict[str, float]) -> str:
    text = f"state error {found['state_error']:.4f}"
    if "error_over_bf16" in found:
        text += f" ({found['error_over_bf16']:.2f} of bf16's)"
    return (
        f"{text}, Spearman of probes {found['spearman_probes']:.4f}, "
        f"of rewards {found['spearman']:.4f}, "
        f"accuracy {found['accuracy_percent']:.1f} % ({found['points']:+.2f} points "
        f"[{found['points_low']:+.1f}, {found['points_high']:+.1f}]), "
        f"{packing_note(found)}"
    )


def packing_note(found: dict[str, float]) -> str:
    return f"alone or packed: {found['packing_error']:.1g}"


def packing_error(backbone, rows: Sequence[Sequence[int]], packed: Tensor) -> float:
    """The largest relative difference between the states of rows alone and in their packing."""
    alone = torch.cat([last_states(backbone, [row]) for row in rows])
    return ((alone - packed).norm(dim=1) / alone.norm(dim=1)).max().item()


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Mean over rows of |ours - exact| / |exact|."""
    return ((ours - exact).norm(dim=1) / exact.norm(dim=1)).mean().item()


def spearman(ours: Tensor, exact: Tensor) -> float:
    """Rank correlation of scores (N,), or the mean of it over the columns of (N, probes)."""
    columns = zip(ours.view(len(ours), -1).t(), exact.view(len(exact), -1).t(), strict=True)
    return statistics.fmean(float(spearmanr(a, b).statistic) for a, b in columns)


def plot(rows: list[Row], path: Path) -> None:
    """There are no times to draw."""
    charts.bars(rows, [], path)
