"""Text that is on every machine that runs this: Python's manual pages and package descriptions."""

from __future__ import annotations

import random
import re
from email.message import Message
from importlib.metadata import distributions
from pydoc_data import topics
from typing import cast

PASSAGE = 1500  # characters, cut at a blank line


def local_passages(seed: int = 0) -> list[str]:
    """Shuffled prose passages from `pydoc_data.topics` and installed packages' descriptions."""
    documents = [topics.topics[name] for name in sorted(topics.topics)]
    readmes = {}
    for distribution in distributions():
        text = cast(Message, distribution.metadata).get_payload()
        name = distribution.metadata["Name"]
        if isinstance(text, str) and name and len(text) > 400:
            readmes[name.lower()] = text
    documents += [readmes[name] for name in sorted(readmes)]
    passages = [piece for document in documents for piece in split(prose(document))]
    random.Random(seed).shuffle(passages)
    return passages


def prose(text: str) -> str:
    """Without badges, link targets and HTML, which teach an SAE little about answers."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>]+>|^\s*\.\. .*$|^\s*\[!?\[.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text)


def split(text: str, size: int = PASSAGE) -> list[str]:
    """Passages of about `size` characters, cut at blank lines; short remainders are dropped."""
    passages, current = [], ""
    for paragraph in text.split("\n\n"):
        if current and len(current) + len(paragraph) > size:
            passages.append(current.strip())
            current = ""
        current += paragraph + "\n\n"
    passages.append(current.strip())
    return [p for p in passages if len(p) > 200]
