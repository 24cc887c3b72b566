"""Reading benchmark files and their rules: preference pairs, RewardBench 2, RM-Bench."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sarm.data import BadRecords, Record, read_preferences, read_records
from sarm.errors import InputError
from sarm.evaluation.metrics import Benchmark, Item
from sarm.tokens import Message


def preferences(path: str | Path, bad: BadRecords | None = None) -> Benchmark:
    """Pairwise accuracy on any preference file; a tie counts a half."""
    items = [
        Item([pair.chosen, pair.rejected], 1, pair.where, pair.prompt_key)
        for pair in read_preferences(path, bad)
    ]
    return _benchmark(Path(path).name.split(".")[0], items, judge_pair, path)


def judge_pair(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """1 when chosen scores higher, a half at a tie."""
    return {"accuracy": float((chosen[0] > rejected[0]) + 0.5 * (chosen[0] == rejected[0]))}


def reward_bench_2(path: str | Path) -> Benchmark:
    """RewardBench 2 rows other than Ties: best of all, credit 1/(number tied at the top)."""
    items = []
    for record in read_records(path):
        if str(record.fields.get("subset", "")).lower() == "ties":
            raise InputError(f"{record.where}: the Ties subset has rules of its own; leave it out")
        item = _prompt_item(record)
        counts = (item.n_chosen, len(item.conversations) - item.n_chosen)
        if counts[0] != 1:
            raise InputError(f"{record.where}: RewardBench 2 has 1 chosen, got {counts[0]}")
        for name, count in zip(("num_correct", "num_incorrect"), counts, strict=True):
            if record.fields.get(name, count) != count:
                raise InputError(
                    f"{record.where}: {name} is {record.fields[name]} but there are {count}"
                )
        items.append(item)
    return _benchmark(f"RewardBench 2 {Path(path).stem}", items, judge_best_of, path)


def judge_best_of(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Best of all, and each rejected answer on its own."""
    scores = np.concatenate([chosen, rejected])
    top = scores == scores.max()
    best = float(top[: len(chosen)].any()) / float(top.sum())
    pairs = chosen[:, None] - rejected[None, :]
    return {"accuracy": best, "pairwise": float(((pairs > 0) + 0.5 * (pairs == 0)).mean())}


def rm_bench(path: str | Path) -> Benchmark:
    """RM-Bench: chosen_i > rejected_j over the styles concise, plain, markdown."""
    items = []
    for record in read_records(path):
        item = _prompt_item(record)
        if item.n_chosen != 3 or len(item.conversations) != 6:
            raise InputError(
                f"{record.where}: RM-Bench has 3 chosen and 3 rejected, got "
                f"{item.n_chosen} and {len(item.conversations) - item.n_chosen}"
            )
        items.append(item)
    name = Path(path).stem.removesuffix("_filtered")
    return _benchmark(f"RM-Bench {name}", items, judge_rm_bench, path)


def judge_rm_bench(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Strict wins: hard above the diagonal (plainer chosen), normal on it, easy below."""
    wins = (chosen[:, None] > rejected[None, :]).astype(float)
    above, below = np.triu_indices(3, 1), np.tril_indices(3, -1)
    easy, normal, hard = wins[below].mean(), np.diag(wins).mean(), wins[above].mean()
    return {
        "accuracy": float((easy + normal + hard) / 3),
        "easy": float(easy),
        "normal": float(normal),
        "hard": float(hard),
    }


def _prompt_item(record: Record) -> Item:
    fields = record.fields
    for name in ("prompt", "chosen", "rejected"):
        if name not in fields:
            raise InputError(f"{record.where}: field {name!r} is missing")
    prompt, chosen, rejected = fields["prompt"], fields["chosen"], fields["rejected"]
    answers = [chosen] if isinstance(chosen, str) else chosen
    others = [rejected] if isinstance(rejected, str) else rejected
    if not isinstance(answers, list) or not isinstance(others, list) or not answers or not others:
        raise InputError(f"{record.where}: chosen and rejected must be non-empty lists of answers")
    if not isinstance(prompt, str) or not all(isinstance(a, str) for a in [*answers, *others]):
        raise InputError(f"{record.where}: prompt and answers must be strings")
    turns: list[list[Message]] = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for answer in [*answers, *others]
    ]
    return Item(turns, len(answers), record.where, prompt)


def _benchmark(name: str, items: list[Item], judge, path: str | Path) -> Benchmark:
    if not items:
        raise InputError(f"{path}: no items")
    return Benchmark(name, items, judge)
