"""Explanations of a whole file, a line a row: in order and resumable, as `sarm score` writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from sarm.data import BadRecords, to_conversation, to_pair
from sarm.errors import InputError
from sarm.explanation import Explanation, explain_states
from sarm.interpret.attribution import Comparison, difference, named
from sarm.scorefile import NumberedRow, ScoreFileReport, score_file
from sarm.scorer import SARMScorer
from sarm.tokens import Encoded


def explain_file(
    scorer: SARMScorer,
    source: str | Path,
    out: str | Path,
    *,
    top: int = 20,
    names: Mapping[int, str] | None = None,
    bad: BadRecords | None = None,
    block: int = 256,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> ScoreFileReport:
    """Write an explanation for each row of `source`, or for a preference what decided.

    Rows as for `score_file`, or preferences in any of TRL's formats. A line holds `row`, `id` if
    the input has one, and the fields of `explanation_line` or `comparison_line`.

    Args:
        names: labels of features.  Others, errors and resuming: see `score_file`.
    """
    if top < 0:
        raise InputError(f"explain: top must be >= 0, got {top}")
    return score_file(
        scorer,
        source,
        out,
        bad=bad,
        block=block,
        overwrite=overwrite,
        progress=progress,
        make=partial(_explain_block, top=top, names=names or {}),
        settings={"explanations": top, "labels": _digest(names or {})},
    )


def _digest(names: Mapping[int, str]) -> str:
    """Names the labels: lines with others belong to another run."""
    return hashlib.sha256(json.dumps(sorted(names.items())).encode()).hexdigest()[:16]


def explanation_line(explanation: Explanation) -> dict:
    """reward, bias, contributions, rest, n_rest, n_tokens, dropped_tokens."""
    line = asdict(explanation)
    line["dropped_tokens"] = line.pop("dropped")
    return line


def comparison_line(comparison: Comparison) -> dict:
    """margin, both rewards, differences (feature, chosen, rejected, value), rest, n_rest."""
    return {
        "margin": comparison.margin,
        "chosen": comparison.chosen.reward,
        "rejected": comparison.rejected.reward,
        "differences": [{**asdict(d), "value": d.value} for d in comparison.differences],
        "rest": comparison.rest,
        "n_rest": comparison.n_rest,
        "dropped_tokens": max(comparison.chosen.dropped, comparison.rejected.dropped),
    }


def _explain_block(
    scorer: SARMScorer, rows: list[NumberedRow], bad: BadRecords, top: int, names: Mapping[int, str]
) -> list[dict]:
    ready: list[tuple[NumberedRow, int]] = []  # a row and how many conversations it has
    encoded: list[Encoded] = []
    where: list[str] = []
    for number, record in rows:
        try:
            if "chosen" in record.fields:
                pair = to_pair(record)
                turns = [pair.chosen, pair.rejected]
            else:
                turns = [to_conversation(record)]
            encoded += scorer.encode(turns, lambda _: record.where)  # noqa: B023
            where += [record.where] * len(turns)
            ready.append(((number, record), len(turns)))
        except InputError as error:
            bad.report(str(error))
    model = scorer.model
    states = torch.empty(len(encoded), model.sae.d_model)
    for indices, some in scorer._states([e.ids for e in encoded]):
        states[indices] = some
    every = explain_states(
        model, states.to(model.device), encoded, model.sae.n_latents, where.__getitem__
    )
    lines, at = [], 0
    for (number, record), count in ready:
        line: dict = {"row": number}
        if "id" in record.fields:
            line["id"] = record.fields["id"]
        if count == 2:
            line |= comparison_line(difference(every[at], every[at + 1], top, names))
        else:
            line |= explanation_line(named(shortened(every[at], top), names))
        lines.append(line)
        at += count
    return lines


def shortened(explanation: Explanation, top: int) -> Explanation:
    """The same explanation listing its `top` first contributions; `rest` takes the others."""
    listed, others = explanation.contributions[:top], explanation.contributions[top:]
    return replace(
        explanation,
        contributions=listed,
        rest=explanation.rest + sum(c.value for c in others),
        n_rest=explanation.n_rest + len(others),
    )
