"""Scoring a file of conversations: in order, resumable, one output row for each input row.

Rows are scored in blocks and appended to `OUT.partial`; a finished run renames it. A killed run is
taken up after the last whole row, so no row is lost or written twice. `OUT.partial.json` remembers
what the rows were made with; another model or input is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sarm.checkpoint import replace_file
from sarm.data import BadRecords, Record, read_records, to_conversation
from sarm.errors import InputError
from sarm.scorer import SARMScorer
from sarm.states import fingerprint

NumberedRow = tuple[int, Record]  # an input row and its place, from 0


@dataclass(frozen=True)
class ScoreFileReport:
    """What one call did: rows written by it, rows found from an earlier run, cut and bad ones."""

    scored: int
    resumed: int
    truncated: int
    bad: int


def score_file(
    scorer: SARMScorer,
    source: str | Path,
    out: str | Path,
    *,
    bad: BadRecords | None = None,
    block: int = 256,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
    make: Callable[[SARMScorer, list[NumberedRow], BadRecords], list[dict]] | None = None,
    settings: Mapping[str, object] | None = None,
) -> ScoreFileReport:
    """Write {"row", "reward", "dropped_tokens", "id"?} for each conversation of `source`.

    Input rows hold `messages`, or `prompt` with `completion` or `response`; strings or message
    lists. `row` counts input records from 0, malformed ones and not blank lines included.

    Args:
        bad: skip malformed rows and count them (they get no output row), or stop (default).
        block: rows that are scored and made durable together.
        progress: called with the rows done since the last call.
        make: output lines of a block in place of rewards; each has `row` and `dropped_tokens`.
        settings: what else the lines depend on; a partial run with other ones is refused.
    Raises:
        InputError: malformed row (file:line); `out` exists; a partial run of something else.
        FileNotFoundError: no input.  Nothing is left behind when no row was done.
    """
    bad = bad or BadRecords()
    scorer = scorer.without_prefix_cache()  # a resumed run gives the bytes of an unbroken one
    out = Path(out)
    if block < 1:
        raise InputError(f"block must be at least 1, got {block}")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; choose another file or pass --overwrite")
    partial = out.with_name(out.name + ".partial")
    note = out.with_name(out.name + ".partial.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    _claim(note, partial, {**_identity(scorer, source), **(settings or {})})
    resumed, next_row, truncated = _recover(partial)
    progress(resumed)
    scored = 0
    records = _numbered(read_records(source, bad), bad)
    try:
        records = _skip_done(records, next_row, resumed, bad)
        with open(partial, "a", encoding="utf-8") as file:
            for rows in _blocks(records, block):
                lines = (make or _score_block)(scorer, rows, bad)
                truncated += sum(line["dropped_tokens"] > 0 for line in lines)
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
                scored += len(lines)
                progress(len(rows))
    except BaseException:
        if not partial.exists() or not partial.stat().st_size:  # nothing that could be resumed
            partial.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
        raise
    os.replace(partial, out)
    note.unlink()
    return ScoreFileReport(scored, resumed, truncated, bad.count)


def _score_block(scorer: SARMScorer, rows: list[NumberedRow], bad: BadRecords) -> list[dict]:
    ready, encoded = [], []
    for number, record in rows:
        try:
            encoded += scorer.encode([to_conversation(record)], lambda _: record.where)  # noqa: B023
            ready.append((number, record))
        except InputError as error:
            bad.report(str(error))
    rewards = scorer.score_token_ids([e.ids for e in encoded]).tolist()
    lines: list[dict] = []
    for (number, record), item, reward in zip(ready, encoded, rewards, strict=True):
        line = {"row": number, "reward": reward, "dropped_tokens": item.dropped}
        if "id" in record.fields:
            line["id"] = record.fields["id"]
        lines.append(line)
    return lines


def _numbered(records: Iterator[Record], bad: BadRecords) -> Iterator[tuple[int, Record]]:
    """Each record with its place among all of them; what the reader skips has a place as well."""
    number = 0
    while True:
        before = bad.count
        record = next(records, None)
        number += bad.count - before
        if record is None:
            return
        yield number, record
        number += 1


def _skip_done(
    records: Iterator[tuple[int, Record]], start: int, written: int, bad: BadRecords
) -> Iterator[tuple[int, Record]]:
    """The records from number `start` on; those before it without a row were bad."""
    passed = 0
    for number, record in records:
        if number >= start:
            records = itertools.chain([(number, record)], records)
            break
        passed += 1
    if passed > written:
        bad.count += passed - written
        bad.first = bad.first or "in the earlier run"
    return records


def _blocks(records: Iterator[tuple[int, Record]], size: int) -> Iterator[list[tuple[int, Record]]]:
    while block := list(itertools.islice(records, size)):
        yield block


def _identity(scorer: SARMScorer, source: str | Path) -> dict:
    path = Path(source)
    return {
        "model": fingerprint(scorer.model),
        "input": sha256(path) if path.is_file() else str(source),
        "max_length": scorer.max_length,
    }


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _claim(note: Path, partial: Path, identity: dict) -> None:
    if partial.exists() and note.exists():
        earlier = json.loads(note.read_text("utf-8"))
        for name, value in identity.items():
            if earlier.get(name) != value:
                raise InputError(
                    f"{partial}: an unfinished run with another {name} ({earlier.get(name)}, now "
                    f"{value}); delete it to start anew"
                )
        return
    partial.unlink(missing_ok=True)
    with replace_file(note) as file:
        json.dump(identity, file)


def _recover(partial: Path) -> tuple[int, int, int]:
    """(whole rows, next input row, truncated) of an unfinished file; cuts a torn last line."""
    if not partial.exists():
        return 0, 0, 0
    rows = next_row = truncated = keep = 0
    with open(partial, "rb+") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except json.JSONDecodeError:
                row = None
            if row is None:
                break
            keep += len(line)
            rows, next_row = rows + 1, row["row"] + 1
            truncated += row["dropped_tokens"] > 0
        file.truncate(keep)
    return rows, next_row, truncated
