"""What the page asks, answered as plain data; knows nothing of HTTP."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from sarm.dashboard import profiles
from sarm.dashboard.sets import EvaluationSet
from sarm.errors import InputError
from sarm.features import FeatureStore
from sarm.features.store import ORDERS, Feature
from sarm.interpret.attribution import named
from sarm.interpret.html import facts
from sarm.interpret.trace import trace
from sarm.scorer import SARMScorer
from sarm.steering.files import profile_fields
from sarm.steering.heads import own_profile
from sarm.steering.labels import FeatureNames
from sarm.tokens import Message

#: Features listed for a response: all active ones of any TopK SARM known, and a bound for others.
LISTED = 512
CONTEXTS = {"top": 12, "sample": 6}
#: Without a feature database there is nothing else to sort by.
HEAD_ORDERS = ("weight", "id")
#: Features that one answer may list, and those that a page begins with.
PAGE, FIRST_PAGE = 200, 50


class Views:
    """One scorer, and, as far as they were given, a feature database, sets and a folder.

    Args:
        scorer: with a tokenizer.  store: collected with the same features.
        profiles_dir: where profiles may be saved; None: nowhere.
    Raises:
        InputError: the database is of another model, or not finished; no tokenizer.
    """

    def __init__(
        self,
        scorer: SARMScorer,
        name: str,
        store: FeatureStore | None = None,
        sets: Sequence[EvaluationSet] = (),
        profiles_dir: Path | None = None,
    ) -> None:
        if scorer.tokenizer is None:
            raise InputError("dashboard: the model has no tokenizer; the page scores text")
        if store is not None:
            store.check(scorer.model)
            if store.meta.get("complete") != "true":
                raise InputError(f"{store.path}: not complete; finish `sarm features collect`")
        self.scorer, self.name, self.store, self.sets = scorer, name, store, list(sets)
        self.profiles_dir = profiles_dir
        self._weights = scorer.model.score.weight[0].detach().float().cpu()
        self._linear = own_profile(scorer.model) is None
        self._saving = threading.Lock()
        self._names: dict[int, str] = {}
        self._names_at: tuple | None = None

    def about(self) -> dict[str, Any]:
        """What there is to show."""
        sae = self.scorer.model.sae
        return {
            "model": self.name,
            "n_latents": sae.n_latents,
            "linear": self._linear,
            "max_length": self.scorer.max_length,
            "database": self.store is not None,
            "rows": int(self.store.meta["rows"]) if self.store else 0,
            "orders": list(ORDERS if self.store else HEAD_ORDERS),
            "sets": [one.about() for one in self.sets],
            "saves": self.profiles_dir is not None,
        }

    def start(self) -> dict[str, Any]:
        """`about`, the first page of features and the first set unsteered: a page's first view."""
        order = "contribution" if self.store else "weight"
        return {
            "about": self.about(),
            "order": order,
            "features": self.features("", order, 0, FIRST_PAGE),
            "shift": self.sets[0].unsteered if self.sets else None,
            **self.profiles(),
        }

    # ---- responses -------------------------------------------------------------------------

    def score(self, prompt: str, responses: Sequence[str]) -> dict[str, Any]:
        """Every response's reward with its features, the largest first; they sum to it."""
        names, out = self.names(), []
        for i, response in enumerate(responses):
            try:
                found = named(self.scorer.explain(_talk(prompt, response), LISTED), names)
            except InputError as error:
                raise InputError(f"responses[{i}]: {error}") from None
            parts = sum(c.value for c in found.contributions)
            out.append({**asdict(found), "sum": found.bias + parts + found.rest})
        return {"responses": out}

    def trace(
        self, prompt: str, response: str, reading: Literal["ended", "read"], top: int
    ) -> dict[str, Any]:
        """The reward and its largest features along one response."""
        found = trace(self.scorer, _talk(prompt, response), top, reading, self.names())
        return {
            "tokens": found.tokens,
            "rewards": found.rewards,
            "features": [asdict(one) for one in found.features],
        }

    # ---- steering --------------------------------------------------------------------------

    def shift(self, fields: Any, at: int) -> dict[str, Any]:
        """A profile's effect on set `at`."""
        if not self.sets:
            raise InputError("set: there is none; start with --set FILE")
        if not 0 <= at < len(self.sets):
            raise InputError(f"set: expected 0 to {len(self.sets) - 1}, got {at}")
        return self.sets[at].shift(profiles.read_profile(fields, self.scorer.model))

    def yaml(self, fields: Any) -> dict[str, Any]:
        """A profile's file, to be downloaded."""
        profile = profiles.read_profile(fields, self.scorer.model)
        text = profiles.as_yaml(profile, self.scorer.model)
        return {"name": profiles.file_name(profile.name), "text": text}

    def save(self, fields: Any, overwrite: bool) -> dict[str, Any]:
        """Save a profile in the folder."""
        if self.profiles_dir is None:
            raise InputError("profiles: cannot be saved here; start with --profiles DIR")
        profile = profiles.read_profile(fields, self.scorer.model)
        if not profile.changes and profile.when is None:
            raise InputError("profile: changes nothing; expected features")
        with self._saving:  # between two requests for one name, the second finds the first's file
            path = profiles.save(profile, self.scorer.model, self.profiles_dir, overwrite)
        return {"name": path.name}

    def profiles(self) -> dict[str, Any]:
        """File names of the saved profiles."""
        return {"profiles": profiles.saved(self.profiles_dir) if self.profiles_dir else []}

    def load(self, name: str) -> dict[str, Any]:
        """A saved profile: the mapping of its file, and what its features are called and weigh."""
        if self.profiles_dir is None:
            raise InputError("profiles: there are none; start with --profiles DIR")
        names = FeatureNames.of_database(self.store.path) if self.store else None
        profile = profiles.load(name, self.profiles_dir, self.scorer.model, names)
        labels = self.names()
        known = {
            j: {"label": labels.get(j), "weight": self._weights[j].item()} for j in profile.changes
        }
        return {"file": name, "profile": profile_fields(profile), "known": known}

    # ---- features --------------------------------------------------------------------------

    def names(self) -> dict[int, str]:
        """Labels by feature, read again when another process has written some."""
        if self.store is None:
            return {}
        version = tuple(self.store.rows("PRAGMA data_version"))
        if version != self._names_at:
            self._names, self._names_at = self.store.names(), version
        return self._names

    def features(self, query: str, order: str, offset: int, limit: int) -> dict[str, Any]:
        """A page of features: all, or those found by number, label or words of their contexts."""
        limit = min(limit, PAGE)
        if self.store is None:
            return self._head(query, order, offset, limit)
        wanted: dict[int, str] | None = None
        if query.strip():
            hits = self.store.search(query, limit=self._weights.numel())
            wanted = {hit.feature: hit.text for hit in hits if hit.where == "context"}
            wanted |= {hit.feature: "" for hit in hits if hit.where == "label"}
            if (at := self._number(query)) is not None:
                wanted[at] = wanted.get(at, "")
        among = None if wanted is None else list(wanted)
        found = self.store.features(order, limit, among is None, offset, among)
        names = self.names()
        if among is None:
            ((total,),) = self.store.rows("SELECT count(*) FROM feature WHERE rows > 0")
        else:
            total = len(among)
        rows = [_row(f, names.get(f.id), _excerpt((wanted or {}).get(f.id, ""))) for f in found]
        return {"total": total, "offset": offset, "features": rows}

    def feature(self, id: int) -> dict[str, Any]:
        """One feature: its numbers, labels and contexts."""
        if not 0 <= id < self._weights.numel():
            raise InputError(f"feature: expected 0 to {self._weights.numel() - 1}, got {id}")
        weight = self._weights[id].item()
        if self.store is None:
            return {
                "id": id,
                "label": None,
                "weight": weight,
                "facts": [("head weight", f"{weight:+.6f}")],
                "labels": [],
                "contexts": [],
            }
        found = self.store.feature(id)
        contexts = [
            asdict(one)
            for kind, count in CONTEXTS.items()
            for one in self.store.contexts(id, kind, count)  # type: ignore[arg-type]
        ]
        return {
            "id": id,
            "label": self.names().get(id),
            "weight": weight,
            "facts": facts(found),
            "labels": [asdict(one) for one in self.store.labels(id)],
            "contexts": contexts,
        }

    def _head(self, query: str, order: str, offset: int, limit: int) -> dict[str, Any]:
        """What the head alone says of features, where there is no database."""
        if order not in HEAD_ORDERS:
            raise InputError(f"order: expected {' or '.join(HEAD_ORDERS)}, got {order!r}")
        ids = range(self._weights.numel())
        if query.strip():
            at = self._number(query)
            ids = range(0) if at is None else range(at, at + 1)
        listed = sorted(ids, key=lambda j: -abs(self._weights[j].item()) if order != "id" else j)
        rows = [
            {"id": j, "label": None, "weight": self._weights[j].item(), "excerpt": ""}
            for j in listed[offset : offset + limit]
        ]
        return {"total": len(listed), "offset": offset, "features": rows}

    def _number(self, query: str) -> int | None:
        """The feature that a query names by its number."""
        text = query.strip().lstrip("#")
        at = int(text) if text.isdecimal() and len(text) < 10 else -1
        return at if 0 <= at < self._weights.numel() else None


def _talk(prompt: str, response: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _excerpt(text: str, length: int = 160) -> str:
    """The end of a context, where its feature is read."""
    text = " ".join(text.split())
    return text if len(text) <= length else "…" + text[-length:]


def _row(feature: Feature, label: str | None, excerpt: str) -> dict[str, Any]:
    row = asdict(feature)
    del row["histogram"]
    return {**row, "label": label, "excerpt": excerpt}
