"""Labels without a model: the words that tell a feature's contexts from those of the others.

Class-based TF-IDF as in BERTopic (arXiv 2203.05794): a class is the contexts of one feature,

    score(t, c) = n(t, c) * log(1 + A / f(t))

A: words of an average class.  f(t): contexts of all features that have term t.  n(t, c): contexts
of the class that have it; contexts, not occurrences, so that one long list cannot name a feature.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sarm.features import Context, Feature, FeatureStore
from sarm.labels.contexts import Sampling, Splits
from sarm.labels.detection import judged
from sarm.labels.prompts import clean
from sarm.labels.records import Records

METHOD = "offline"
#: Begins every label, so that nobody takes it for a reader's.
MARK = "statistics: "
#: Terms in a label.
TERMS = 3
#: Correlations that are worth a word in a label.
STRONG = 0.3

WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")
#: Tokens of chat templates: every response ends with one, and they say nothing to a reader.
MARKUP = re.compile(r"<\|[^|<>\s]+\|>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>")
CELLS = 1 << 24


def terms(text: str) -> set[str]:
    """Words, runs of punctuation and pairs of neighbours, in lower case, between template tokens.

    Nothing is stemmed and no word is stopped: features of style live on "i" and "**".
    """
    found: set[str] = set()
    for part in MARKUP.split(text):
        words = [w.lower() for w in WORD.findall(part)]
        found.update(words, (f"{a} {b}" for a, b in pairwise(words)))
    return found


class Background:
    """How many contexts of a database have a term, in 64 MiB however many terms there are.

    Terms are hashed into 2^24 cells; two that share one count together, which lowers the score of
    the rarer one.
    """

    def __init__(self, store: FeatureStore, progress: Callable[[float], None]) -> None:
        self._count = np.zeros(CELLS, np.uint32)
        self.contexts, words, classes = 0, 0, 0
        for (feature,) in store.rows("SELECT DISTINCT feature FROM context ORDER BY feature"):
            classes += 1
            for text in {c.text for c in store.contexts(feature, kind=None)}:
                found = terms(text)
                words += len(found)
                self.contexts += 1
                np.add.at(self._count, [_cell(term) for term in found], 1)
            progress(1)
        self.words_per_class = words / max(1, classes)

    def weight(self, term: str) -> float:
        """log(1 + A / f): the inverse frequency of c-TF-IDF."""
        return math.log1p(self.words_per_class / max(1, int(self._count[_cell(term)])))


@dataclass(frozen=True)
class Named:
    """Terms that name a feature, each with the number of shown contexts that have it."""

    terms: dict[str, int]
    shown: int

    def says(self, context: Context) -> bool:
        """Whether the label alone would call a context activating: it has one of the terms."""
        return not terms(context.text).isdisjoint(self.terms)


def name(shown: Sequence[Context], background: Background, count: int = TERMS) -> Named:
    """The terms of highest c-TF-IDF that at least two contexts have; equal scores by alphabet."""
    counts = Counter(term for context in shown for term in terms(context.text))
    scored = sorted(
        ((-n * background.weight(term), term) for term, n in counts.items() if n > 1),
    )
    chosen: dict[str, int] = {}
    for _, term in scored:
        if len(chosen) == count:
            break
        if not any(_within(term, had) or _within(had, term) for had in chosen):
            chosen[term] = counts[term]
    return Named(chosen, len(shown))


def label_offline(
    store: FeatureStore,
    features: Sequence[int],
    how: Sampling,
    progress: Callable[[float], None] = lambda features: None,
) -> tuple[Records, dict[int, str]]:
    """Label features by their statistics; returns what was recorded and the failures' reasons.

    The detection score is of the same held-out contexts as a language model's.
    """
    records = Records(store, METHOD)
    splits, background = Splits(store, how), Background(store, progress)
    failed: dict[int, str] = {}
    for feature in features:
        part = splits(feature)
        named = name(part.shown, background)
        if named.terms:
            detection = judged(
                (truth, named.says(context)) for context, truth in part.shuffled(how.seed)
            )
            known = store.feature(feature)
            records.add(
                feature,
                clean(MARK + " · ".join([*named.terms, *traits(known)])),
                clean(_explanation(named, known)),
                None,  # how consistent contexts are takes a reader
                detection.accuracy,
                {
                    "statistical": True,
                    "terms": named.terms,
                    "threshold": how.threshold,
                    "sampling_seed": how.seed,
                    "shown": [c.id for c in part.shown],
                    "detection": detection.details(),
                },
            )
        else:
            failed[feature] = "no term is in two of its contexts"
            records.fail(feature, failed[feature])
        progress(1)
    return records, failed


def traits(feature: Feature) -> list[str]:
    """What its correlations say of a feature, in words."""
    found = []
    for value, more, less in (
        (feature.length_corr, "longer responses", "shorter responses"),
        (feature.markdown_corr, "more markdown", "less markdown"),
    ):
        if value is not None and abs(value) >= STRONG:
            found.append(more if value > 0 else less)
    return found


def _explanation(named: Named, feature: Feature) -> str:
    found = ", ".join(f"{term!r} ({n} of {named.shown})" for term, n in named.terms.items())
    reward = "raises" if feature.contribution > 0 else "lowers"
    return (
        f"By statistics, not by a reader: terms that tell its contexts from others: "
        f"{found}. Active in {100 * feature.frequency:.2g} % of responses, where it {reward} the "
        "reward."
    )


def _within(part: str, whole: str) -> bool:
    return f" {part} " in f" {whole} "


def _cell(term: str) -> int:
    return zlib.crc32(term.encode("utf-8", "replace")) & (CELLS - 1)
