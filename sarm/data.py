"""Reading what users have: texts and preferences from jsonl, gz, json, txt, parquet or the hub.

Everything streams. A record knows where it came from (`file:line`), so that an error names it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sarm.errors import InputError, first_line
from sarm.tokens import ConversationEncoder, Message

TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json", ".parquet")


@dataclass
class BadRecords:
    """What to do with records that cannot be read: stop (default), or skip and count them."""

    skip: bool = False
    count: int = 0
    first: str | None = None

    def report(self, problem: str) -> None:
        """Raise, or count a problem."""
        if not self.skip:
            raise InputError(problem)
        self.count += 1
        self.first = self.first or problem


@dataclass(frozen=True)
class Record:
    """One row of a file: its fields and its place, `file:line`."""

    where: str
    fields: dict


@dataclass(frozen=True)
class PreferencePair:
    """Two conversations that share a prompt; the first one's answer is preferred."""

    chosen: list[Message]
    rejected: list[Message]
    where: str
    extra: dict = field(default_factory=dict)

    @property
    def prompt_key(self) -> str:
        """Equal for pairs of one prompt: splits and bootstraps go by prompt, not by pair."""
        return json.dumps([(m["role"], m["content"]) for m in self.chosen[:-1]])


def read_records(source: str | Path, bad: BadRecords | None = None) -> Iterator[Record]:
    """Rows of a file, of every known file in a folder, or of `hub:owner/name[:split]`.

    Raises:
        FileNotFoundError: nothing there.  InputError: unknown suffix, malformed row (file:line).
    """
    bad = bad or BadRecords()
    text = str(source)
    if text.startswith("hub:"):
        yield from _read_hub(text)
        return
    path = Path(text).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(TEXT_SUFFIXES))
        if not files:
            raise InputError(f"{path}: no file with a suffix of {', '.join(TEXT_SUFFIXES)}")
        for file in files:
            yield from read_records(file, bad)
        return
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path)
    elif path.name.endswith(".json"):
        yield from _read_json(path, bad)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_jsonl(path, bad)
    elif path.name.endswith(".txt"):
        yield from _read_txt(path, bad)
    else:
        raise InputError(f"{path}: expected a suffix of {', '.join(TEXT_SUFFIXES)}")


def read_texts(
    source: str | Path, bad: BadRecords | None = None, key: str = "text"
) -> Iterator[tuple[str, str]]:
    """(where, text) of every document; blank ones are passed over."""
    bad = bad or BadRecords()
    for record in read_records(source, bad):
        text = record.fields.get(key)
        if not isinstance(text, str):
            bad.report(f"{record.where}: expected a string field {key!r}, got {_kinds(record)}")
        elif text.strip():
            yield record.where, text


def read_preferences(source: str | Path, bad: BadRecords | None = None) -> Iterator[PreferencePair]:
    """Preference pairs in TRL's formats: conversational or plain, with or without `prompt`.

    With message lists, chosen and rejected are the answers to `prompt`, or whole conversations
    (without a prompt, or both beginning with it). Plain strings become a user message and an
    assistant message; without a prompt their longest common prefix, cut back to a space, is the
    prompt.
    """
    bad = bad or BadRecords()
    for record in read_records(source, bad):
        try:
            yield to_pair(record)
        except InputError as error:
            bad.report(str(error))


def to_pair(record: Record) -> PreferencePair:
    """One record in any of TRL's preference formats as two whole conversations."""
    row = record.fields
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if missing:
        raise InputError(f"{record.where}: field {missing[0]!r} is missing, got {_kinds(record)}")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    for name in ("chosen", "rejected"):
        if not isinstance(row[name], (str, list)):
            raise InputError(f"{record.where}: {name} must be a string or a list of messages")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise InputError(
            f"{record.where}: chosen and rejected must both be strings or both lists of messages"
        )
    if isinstance(chosen, str):
        if prompt is None:
            prompt = _common_prefix(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        chosen = [{"role": "assistant", "content": chosen}]
        rejected = [{"role": "assistant", "content": rejected}]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt.strip() else []
    prompt = prompt or []
    for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
            raise InputError(f"{record.where}: {name} must be a string or a list of messages")
        for i, message in enumerate(value):
            if "role" not in message or "content" not in message:
                got = ", ".join(map(str, message)) or "nothing"
                raise InputError(
                    f"{record.where}: {name}, message {i}: expected role and content, got {got}"
                )
    if not chosen or not rejected:
        raise InputError(f"{record.where}: empty conversation")
    if prompt and _begins(chosen, prompt) and _begins(rejected, prompt):
        prompt = []  # whole conversations beside their prompt, as in UltraFeedback
    extra = {k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected")}
    return PreferencePair([*prompt, *chosen], [*prompt, *rejected], record.where, extra)


def read_conversations(
    source: str | Path, bad: BadRecords | None = None
) -> Iterator[tuple[str, list[Message]]]:
    """(where, messages) of every conversation: of scoring rows, and both sides of preferences."""
    bad = bad or BadRecords()
    for record in read_records(source, bad):
        try:
            if "chosen" in record.fields:
                pair = to_pair(record)
                sides = [("chosen", pair.chosen), ("rejected", pair.rejected)]
                found = [(f"{record.where} ({side})", turns) for side, turns in sides]
            else:
                found = [(record.where, to_conversation(record))]
        except InputError as error:
            bad.report(str(error))
        else:
            yield from found


def usable_conversations(
    conversations: Iterable[tuple[str, list[Message]]],
    encoder: ConversationEncoder,
    bad: BadRecords,
) -> Iterator[tuple[str, list[Message]]]:
    """Those the chat template accepts; the others are reported to `bad`."""
    for where, turns in conversations:
        try:
            encoder.render(turns, where)
        except InputError as error:
            bad.report(str(error))
        else:
            yield where, turns


def to_conversation(record: Record) -> list[Message]:
    """A row with `messages`, or with `prompt` and `completion` or `response`."""
    fields = record.fields
    if isinstance(fields.get("messages"), list):
        return fields["messages"]
    answer = fields.get("completion", fields.get("response"))
    if "prompt" not in fields or answer is None:
        have = ", ".join(fields) or "nothing"
        raise InputError(
            f"{record.where}: expected `messages`, or `prompt` with `completion` or `response`; "
            f"got {have}"
        )
    return join_turns(fields["prompt"], answer, record.where)


def join_turns(prompt, completion, where: str) -> list[Message]:
    """One conversation from a prompt and a completion, each a string or a message list."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(prompt, (list, tuple)) or not isinstance(completion, (list, tuple)):
        raise InputError(
            f"{where}: prompt and completion must be strings or message lists, got "
            f"{type(prompt).__name__} and {type(completion).__name__}"
        )
    return [*prompt, *completion]


def _begins(conversation: list[Message], prompt: list[Message]) -> bool:
    start = conversation[: len(prompt)]
    key = [(m["role"], m["content"]) for m in prompt]
    return len(conversation) > len(prompt) and [(m["role"], m["content"]) for m in start] == key


def _common_prefix(a: str, b: str) -> str:
    pairs = enumerate(zip(a, b, strict=False))
    end = next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
    return a[: a.rfind(" ", 0, end) + 1] if end < max(len(a), len(b)) else a[:end]


def _read_jsonl(path: Path, bad: BadRecords) -> Iterator[Record]:
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as lines:
        number = 0
        while True:
            number += 1
            try:
                line = lines.readline()
            except (EOFError, OSError, zlib.error) as error:  # gzip: cut, or damaged
                raise InputError(f"{path}:{number}: cannot read on ({error})") from error
            if not line:
                return
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                bad.report(f"{path}:{number}: malformed JSON ({first_line(error)})")
                continue
            if not isinstance(fields, dict):
                bad.report(f"{path}:{number}: expected an object, got {type(fields).__name__}")
                continue
            yield Record(f"{path}:{number}", fields)


def _read_json(path: Path, bad: BadRecords) -> Iterator[Record]:
    try:
        rows = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: malformed JSON ({first_line(error)})") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of objects, got {type(rows).__name__}")
    for i, row in enumerate(rows):
        if isinstance(row, dict):
            yield Record(f"{path}[{i}]", row)
        else:
            bad.report(f"{path}[{i}]: expected an object, got {type(row).__name__}")


def _read_txt(path: Path, bad: BadRecords) -> Iterator[Record]:
    """Documents are separated by blank lines."""
    paragraph: list[str] = []
    start = 1
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad.report(f"{path}:{number}: not UTF-8 ({error.reason})")
                continue
            if line.strip():
                start = start if paragraph else number
                paragraph.append(line)
            elif paragraph:
                yield Record(f"{path}:{start}", {"text": "".join(paragraph)})
                paragraph = []
    if paragraph:
        yield Record(f"{path}:{start}", {"text": "".join(paragraph)})


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"{path}: parquet needs pyarrow: pip install 'sarm[data]'") from error
    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield Record(f"{path}[{number}]", row)
                number += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from error


def _read_hub(text: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{text}: needs datasets: pip install 'sarm[data]'") from error
    _, name, *rest = text.split(":", 2)
    split = rest[0] if rest else "train"
    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        for i, row in enumerate(rows):
            yield Record(f"{name}:{split}[{i}]", row)
    except Exception as error:  # the hub, the network, the file formats
        raise InputError(f"{text}: cannot load ({first_line(error)})") from error


def _kinds(record: Record) -> str:
    return ", ".join(f"{k}: {type(v).__name__}" for k, v in record.fields.items()) or "nothing"
