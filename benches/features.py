"""Suite `features`: what `sarm features collect` costs over `sarm score`, on the same responses.

Both read a file of records, tokenise, run the backbone once and write a file; timed alternately, in
the scorer's dtype and in 8 bits. The shorter the input, the larger collection's share: at first
every response brings a top context of nearly all its features, later few (the number of
contexts that get in grows with the logarithm of the responses). Model and data as in suite `score`
(--model, --data, --prompts).
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import charts
from measure import measure, ratio
from ops import timing_rows
from suite import BenchError, Missing, Options, Row
from workload import conversations, in_int8, make_scorer

from sarm import SARMScorer
from sarm.features.collect import CollectOptions, collect
from sarm.scorefile import score_file

CASE = "features"


def run(options: Options) -> list[Row]:
    """score and collect in the scorer's dtype, and both in 8 bits."""
    scorer = make_scorer(options.device, model=options.model)
    source, prompts, talks = conversations(options)
    tokens = sum(len(e.ids) for e in scorer.encode(talks))
    title = f"{source}, {prompts} prompts, {len(talks)} rows, {tokens} tokens"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"messages": t}) + "\n" for t in talks), "utf-8")
        candidates: dict = {}
        for kind, own in (("fp", scorer), ("int8", in_int8(scorer))):
            for what in (score, features):
                label = f"{what.__name__} {kind}"
                if options.wants(CASE, label):
                    candidates[label] = (
                        own
                        if isinstance(own, Missing)
                        else functools.partial(what, own, rows, folder / label)
                    )
        if not candidates:
            raise BenchError(
                f"--only {options.only!r} selects nothing; candidates: score fp, features fp, "
                "score int8, features int8"
            )
        times, failed = measure(candidates, options.device, options.runs)
    table = timing_rows(CASE, title, "", list(candidates), times, failed)
    for row in table:
        base = row.name.replace("features", "score")
        if row.ms is None or base == row.name or base not in times:
            continue
        row.ratios = {base: ratio(times[row.name], times[base])}
        row.note = f"{100 * (row.ratios[base].value - 1):+.1f} % over {base}"
    return table


def score(scorer: SARMScorer, rows: Path, out: Path) -> None:
    """As `sarm score`."""
    score_file(scorer, rows, out, overwrite=True)


def features(scorer: SARMScorer, rows: Path, out: Path) -> None:
    """As `sarm features collect`; blocks as large as those of `score`."""
    collect(scorer, [rows], out, CollectOptions(block=256), overwrite=True)


def plot(rows: list[Row], path: Path) -> None:
    """Bars: time over that of scoring."""
    charts.bars(rows, [row.name for row in rows if row.name.startswith("score")], path)
