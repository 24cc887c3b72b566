"""Which contexts of a feature the explainer sees, and which it is tested on."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sarm.features import Context, FeatureStore
from sarm.features.background import background


@dataclass(frozen=True)
class Sampling:
    """How contexts are chosen.

    shown: the explainer's, at most; 40 as published.  held_out: positives for detection, at most,
    and as many negatives.  threshold: what counts as active.  seed: of every random choice.
    """

    shown: int = 40
    held_out: int = 20
    threshold: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Split:
    """Contexts of one feature; no text occurs twice, no conversation on both sides.

    shown: the largest activations, largest first.  held_out: active.  negatives: random responses
    in which the feature is exactly zero.
    """

    shown: list[Context]
    held_out: list[Context]
    negatives: list[Context]

    def shuffled(self, seed: int) -> list[tuple[Context, bool]]:
        """The held-out contexts of both classes in random order, each with what it is."""
        items = [(c, True) for c in self.held_out] + [(c, False) for c in self.negatives]
        random.Random(seed).shuffle(items)
        return items


class Splits:
    """Splits of a database's features, the same for every method: their scores are comparable."""

    def __init__(self, store: FeatureStore, how: Sampling) -> None:
        self.store, self.how = store, how
        self._background = background(store)

    def __call__(self, feature: int) -> Split:
        """The split of one feature."""
        how = self.how
        rng = random.Random(f"{how.seed} {feature}")
        every = self.store.contexts(feature, kind=None)
        distinct: dict[str, Context] = {}
        for context in sorted(every, key=lambda c: (c.kind != "top", -c.activation, c.id)):
            if context.activation > how.threshold:
                distinct.setdefault(context.text, context)
        held_out = _hold_out(list(distinct.values()), how.held_out, rng)
        apart = {c.source for c in held_out}
        shown = [c for c in distinct.values() if c.source not in apart][: how.shown]
        negatives = self._negatives(feature, {c.text for c in every}, rng)
        return Split(shown, held_out, negatives[: len(held_out)])

    def _negatives(self, feature: int, texts: set[str], rng: random.Random) -> list[Context]:
        """Distinct spans of the background at whose end the feature is zero."""
        found: dict[str, Context] = {}
        for number in rng.sample(range(len(self._background)), len(self._background)):
            response = self._background[number]
            if len(found) == self.how.held_out:
                break
            if feature not in response.active and response.text not in texts:
                negative = Context(
                    id=-1 - number,
                    feature=feature,
                    kind="background",
                    activation=0.0,
                    position=response.position,
                    tokens=response.tokens,
                    activations=[],
                    source=response.source,
                )
                found.setdefault(response.text, negative)
        return list(found.values())


def _hold_out(contexts: list[Context], count: int, rng: random.Random) -> list[Context]:
    """At most `count` and at most half of the conversations.

    Sampled contexts come first: they stand for all activations, and the explainer is to see the
    top ones. Whole conversations are held out, or two spans of one would be on both sides.
    """
    sources: dict[str, list[Context]] = {}
    for context in contexts:
        sources.setdefault(context.source, []).append(context)
    order = list(sources)
    rng.shuffle(order)
    order.sort(key=lambda s: any(c.kind == "top" for c in sources[s]))
    return [rng.choice(sources[s]) for s in order[: min(count, len(order) // 2)]]
