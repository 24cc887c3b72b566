"""What a response looks like, whatever it says: its length and its markdown."""

from __future__ import annotations

import re

#: Headings, list items, bold text, code fences and inline code, table rows: what style-controlled
#: leaderboards count (headings, lists, bold), and code.
_MARKS = re.compile(
    r"^\s{0,3}#{1,6}\s"
    r"|^\s*(?:[-*+]|\d+[.)])\s"
    r"|^\s*```"
    r"|^\s*\|.*\|\s*$"
    r"|\*\*[^*\n]+\*\*|__[^_\n]+__"
    r"|(?<!`)`[^`\n]+`(?!`)",
    re.MULTILINE,
)


def length(text: str) -> int:
    """Characters."""
    return len(text)


def markdown_marks(text: str) -> int:
    """How many marks of markdown a text has: headings, list items, bold, code, table rows."""
    return sum(1 for _ in _MARKS.finditer(text))
