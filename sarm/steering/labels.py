"""Features by label or tag: what a feature database, or a mapping, calls them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sarm.errors import InputError

if TYPE_CHECKING:
    from sarm.modeling import SarmForSequenceClassification


class FeatureNames:
    """Labels and tags, each naming one feature or more; case and outer blanks do not matter.

    Args:
        labels, tags: {name: features}.  source: where they come from, for messages.
    """

    def __init__(
        self,
        labels: Mapping[str, Iterable[int]],
        tags: Mapping[str, Iterable[int]] | None = None,
        source: str = "the labels",
    ) -> None:
        self.source = source
        self._names = {"label": _folded(labels), "tag": _folded(tags or {})}

    @classmethod
    def of_database(
        cls, path: str | Path, model: SarmForSequenceClassification | None = None
    ) -> FeatureNames:
        """Labels of all methods in a feature database; tags: the list `tags` in their details.

        Raises:
            InputError: no feature database, or one of another model.
        """
        from sarm.features import FeatureStore

        labels: dict[str, list[int]] = {}
        tags: dict[str, list[int]] = {}
        with FeatureStore(path) as store:
            if model is not None:
                store.check(model, head=False)
            for label in store.labels():
                labels.setdefault(label.label, []).append(label.feature)
                for tag in label.details.get("tags", ()):
                    tags.setdefault(str(tag), []).append(label.feature)
        return cls(labels, tags, str(path))

    def find(self, kind: str, name: str, where: str) -> list[int]:
        """Features with this label or tag, ascending.

        Raises:
            InputError: there is none; names the nearest one.
        """
        known = self._names[kind]
        found = known.get(_fold(name))
        if found is None:
            near = difflib.get_close_matches(_fold(name), known, n=1, cutoff=0.0)
            hint = f"; the nearest is {near[0]!r}" if near else f"; it has no {kind}s"
            raise InputError(f"{where}: {self.source} has no {kind} {name!r}{hint}")
        return sorted(found)


def _folded(names: Mapping[str, Iterable[int]]) -> dict[str, set[int]]:
    out: dict[str, set[int]] = {}
    for name, features in names.items():
        out.setdefault(_fold(name), set()).update(features)
    return out


def _fold(name: str) -> str:
    return " ".join(name.split()).casefold()
