"""What the language model is told, and how its answers are read.

The texts are the files of `prompts/`. Explaining follows the published protocol: contexts with
their activations in, "Explanation" and "Score" (1 to 5, monosemanticity) out (arXiv 2508.08746).
Detection follows delphi: numbered contexts in, a list of 0 and 1 out (arXiv 2410.13928).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from importlib.resources import files

from sarm.features import Context

#: Stored with every label. A change of any text in `prompts/` is a new version.
VERSION = "1"
#: Longest explanation kept, characters; the prompt asks for one short sentence.
MAX_EXPLANATION = 600
#: Longest label (the explanation's beginning), characters.
MAX_LABEL = 100
#: Longest answer that is read, without its thoughts, and that is quoted back as unreadable,
#: characters. The patterns below take time with the square of what does not match them.
MAX_ANSWER, MAX_QUOTED = 4000, 2000

Messages = list[dict[str, str]]


class Nonsense(ValueError):
    """An answer that cannot be read; says in one line what is wrong with it."""


def text(name: str) -> str:
    """The prompt file of that name."""
    return files("sarm.labels").joinpath("prompts", f"{name}.txt").read_text("utf-8").strip()


def explain(contexts: Sequence[Context]) -> Messages:
    """Asks what contexts have in common."""
    lines = [f"Activation: {c.activation:.2f}  Sequence: {_quoted(c.text)}" for c in contexts]
    return _chat(text("explain"), "\n".join(lines))


def detect(explanation: str, contexts: Sequence[Context]) -> Messages:
    """Asks which contexts activate a feature of that explanation."""
    lines = [f"{i}: {_quoted(c.text)}" for i, c in enumerate(contexts, 1)]
    return _chat(text("detect"), f"Explanation: {explanation}\n\n" + "\n".join(lines))


def reminded(messages: Messages, answer: str, name: str) -> Messages:
    """The same question once more, after an answer that could not be read."""
    return [
        *messages,
        {"role": "assistant", "content": clipped(answer, MAX_QUOTED)},
        {"role": "user", "content": text(f"{name}_reminder")},
    ]


def read_explanation(answer: str) -> tuple[str, int]:
    """(explanation, score) of an answer.

    Raises:
        Nonsense: no explanation, no whole score from 1 to 5, or several that differ.
    """
    answer = _without_thoughts(answer)
    found = re.findall(
        r"^\W*explanation\W*?:[\s*_]*(.+?)\s*^\W*score\W*?:[\s*_\[(]*([^\n]*)",
        answer,
        re.IGNORECASE | re.MULTILINE | re.DOTALL,
    )
    if len(found) != 1:
        what = "has several explanations" if found else "has no explanation and score"
        raise Nonsense(f"the answer {what}: {clipped(answer, 80)!r}")
    explanation, scored = clean(found[0][0]).strip(" *_"), found[0][1]
    template = re.fullmatch(r"<[^<>]*>|\[[^\[\]]*\]", explanation)  # the format, sent back
    if template or not any(c.isalnum() for c in explanation):
        raise Nonsense(f"the explanation is empty: {clipped(answer, 80)!r}")
    # "4", "4/5", "**4**", "[4]", "4 (clear)"; not "4.5", "4/3/2", "45", "-4"
    score = re.match(r"([1-5])(?:\s*/\s*5(?![\d/.]))?(?!\s*/)(?![\d])(?!\.\d)", scored)
    if score is None:
        raise Nonsense(f"the score is not a whole number from 1 to 5: {clipped(scored, 80)!r}")
    return clipped(explanation, MAX_EXPLANATION), int(score[1])


def read_detection(answer: str, count: int) -> list[bool]:
    """The judgements of `count` contexts.

    Raises:
        Nonsense: no list of 0 and 1, one of another length, or several that differ.
    """
    lists = re.findall(r"\[[01\s,]*\]", _without_thoughts(answer))
    found = {tuple(re.findall("[01]", found)) for found in lists}
    if len(found) != 1:
        what = "several lists" if found else "no list"
        raise Nonsense(f"the answer has {what} of 0 and 1: {clipped(answer, 80)!r}")
    (judged,) = found
    if len(judged) != count:
        raise Nonsense(f"the answer judges {len(judged)} sequences, not {count}")
    return [number == "1" for number in judged]


def clean(words: str) -> str:
    """One line without control characters: nothing that moves a terminal's cursor or turns text."""
    kept = (" " if c.isspace() else c for c in words if c.isspace() or not _control(c))
    return " ".join("".join(kept).split())


def clipped(words: str, length: int) -> str:
    """`clean` words, cut at a word's end if they are too long."""
    words = clean(words)
    if len(words) <= length:
        return words
    return words[: length - 1].rsplit(" ", 1)[0].rstrip(" ,;:.") + "…"


def _control(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co")


def _quoted(words: str) -> str:
    return json.dumps(words, ensure_ascii=False)


def _without_thoughts(answer: str) -> str:
    """What comes after the thoughts of a reasoning model, which may not say where they begin.

    Raises:
        Nonsense: that is longer than an answer may be.
    """
    answer = re.split("</think(?:ing)?>", answer)[-1]
    if len(answer) > MAX_ANSWER:
        raise Nonsense(f"the answer has {len(answer)} characters: {clipped(answer[:200], 80)!r}")
    return answer


def _chat(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
