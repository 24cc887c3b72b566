"""The same answer in another style: deterministic changes that leave the content as it is."""

from __future__ import annotations

import re
from collections.abc import Callable

FILLER = (
    "It is worth taking a moment to consider this carefully.",
    "There are, of course, several things that one might keep in mind here.",
    "As always, the details depend on the situation at hand.",
    "In other words, the points above are what matters most.",
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])")
_ITEM = re.compile(r"^(\s*)(?:[-*+•]|\d+[.)])\s+", re.MULTILINE)


def add_markdown(answer: str) -> str:
    """A heading, and every sentence of the prose as a list item with its first words in bold."""
    if "```" in answer or _ITEM.search(answer):
        return f"## Answer\n\n{answer}"
    items = [_bold_start(s) for s in _SENTENCE.split(answer.strip()) if s]
    return "## Answer\n\n" + "\n".join(f"- {item}" for item in items)


def remove_markdown(answer: str) -> str:
    """Headings, emphasis, list marks and rules taken out; code fences keep their content."""
    answer = re.sub(r"^[ \t]*```.*\n?", "", answer, flags=re.MULTILINE)
    answer = re.sub(r"^#{1,6}\s+", "", answer, flags=re.MULTILINE)
    answer = re.sub(r"^[ \t]*(?:-{3,}|\*{3,}|_{3,})[ \t]*(?:\n|$)", "", answer, flags=re.MULTILINE)
    answer = re.sub(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1", r"\2", answer)
    answer = re.sub(r"(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])", r"\1", answer)
    return _ITEM.sub(r"\1", answer)


def pad(answer: str) -> str:
    """Four sentences that say nothing, before the last paragraph so that the end stays."""
    head, mark, tail = answer.rpartition("\n\n")
    filler = " ".join(FILLER)
    return f"{head}\n\n{filler}{mark}{tail}" if mark else f"{filler}\n\n{answer}"


def flatter(answer: str) -> str:
    """Praise of the question first."""
    return f"Great question! It is really thoughtful of you to ask. {answer}"


def agree(answer: str) -> str:
    """Agreement with the user first."""
    return f"You are absolutely right, and I completely agree with you. {answer}"


def reorder(answer: str) -> str:
    """The items of its first list, or else its paragraphs but the last, in reverse order."""
    lines = answer.split("\n")
    at = [i for i, line in enumerate(lines) if _ITEM.match(line) and not line.startswith("  ")]
    run = [i for n, i in enumerate(at) if i == at[0] + n] if at else []
    if len(run) > 1:
        texts = [_ITEM.sub("", lines[i]) for i in run]
        marks = [_ITEM.match(lines[i])[0] for i in run]  # type: ignore[index]
        for i, mark, text in zip(run, marks, reversed(texts), strict=True):
            lines[i] = mark + text
        return "\n".join(lines)
    *body, last = answer.split("\n\n")
    return "\n\n".join([*reversed(body), last]) if len(body) > 1 else answer


#: name: (plainer, more so); the first is the answer itself where the change adds something.
Change = Callable[[str], str]
PERTURBATIONS: dict[str, tuple[Change, Change]] = {
    "markdown": (remove_markdown, add_markdown),
    "length": (str, pad),
    "praise": (str, flatter),
    "agreement": (str, agree),
    "position": (str, reorder),
}


def _bold_start(sentence: str) -> str:
    words = sentence.split(" ")
    start = " ".join(words[:2])
    return " ".join([f"**{start}**", *words[2:]]) if len(words) > 2 else sentence
