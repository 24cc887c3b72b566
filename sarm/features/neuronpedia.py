"""A feature database as a Neuronpedia export, which its admin panel imports.

    OUT/MODEL/SOURCE/features/batch-0.jsonl.gz       a feature a line, 1,024 features a batch
    OUT/MODEL/SOURCE/activations/batch-0.jsonl.gz    contexts of these features
    OUT/MODEL/SOURCE/explanations/batch-0.jsonl.gz   their labels
    OUT/MODEL/SOURCE/{model,release,sourceset,source}.jsonl

SOURCE is `LAYER-SET`, as `15-sarm`. Names and types of the fields are those of Neuronpedia's
tables. What this library does not compute (logits, neuron alignment) is left empty. The histogram's
bars are the database's bins, each at the middle of its edges.

Source: docs.neuronpedia.org/api-and-data/exports; github.com/hijohnnylin/neuronpedia,
utils/neuronpedia-utils/neuronpedia_utils: export-data.py (folders, columns, batches of 1,024),
convert-saedashboard-to-neuronpedia-export.py and db_models/ (fields and types).
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

from sarm.checkpoint import replace_files
from sarm.errors import InputError
from sarm.features.store import Context, Feature, FeatureStore, Label

BATCH = 1024


def export_neuronpedia(
    store: FeatureStore,
    out: str | Path,
    *,
    model_id: str,
    source_set: str = "sarm",
    creator: str = "",
    contexts: int = 20,
) -> Path:
    """Write the export; returns the folder of the source.

    Args:
        model_id, source_set: names on Neuronpedia; letters, digits, dots and dashes.
        creator: id of the Neuronpedia user that will own the rows.
        contexts: at most so many of a kind and feature.
    Raises:
        InputError: a name with other characters, an unfinished database, `out` exists.
    """
    meta, out = store.meta, Path(out)
    for name, value in (("model id", model_id), ("source set", source_set)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", value):
            raise InputError(f"{name}: expected letters, digits, dots and dashes, got {value!r}")
    if meta.get("complete") != "true":
        raise InputError(f"{store.path}: collecting has not been finished")
    if out.exists():
        raise InputError(f"{out}: exists already; choose another folder")
    source = f"{meta['source_layer']}-{source_set}"
    key = {"modelId": model_id, "layer": source}
    now = datetime.now(timezone.utc).isoformat()
    with replace_files(out) as staging:
        folder = Path(staging) / model_id / source
        folder.mkdir(parents=True)
        features = store.features("id", alive=False)
        for number in range(0, len(features), BATCH):
            some = features[number : number + BATCH]
            name = f"batch-{number // BATCH}.jsonl.gz"
            rows = (_feature(f, creator) | {"createdAt": now} for f in some)
            _write(folder / "features" / name, rows, key)
            found = (c for f in some for c in _contexts(store, f.id, contexts))
            rows = (_activation(c, creator) | {"createdAt": now} for c in found)
            _write(folder / "activations" / name, rows, key)
            labels = (label for f in some for label in store.labels(f.id))
            rows = (_explanation(x, creator) | {"createdAt": now} for x in labels)
            _write(folder / "explanations" / name, rows, key)
        release = f"{model_id}-{source_set}"
        owner = {"creatorId": creator, "createdAt": now}
        named = {"displayName": model_id, "displayNameShort": model_id, "updatedAt": now}
        says = f"Features of the reward model {model_id}"
        files = {
            "model": {"id": model_id, "instruct": True, **named, **owner},
            "release": {
                "name": release, "description": says, "descriptionShort": says, "urls": [],
                "creatorName": creator, "creatorNameShort": creator, **owner,
            },
            "sourceset": {
                "modelId": model_id, "name": source_set, "creatorName": creator,
                "releaseName": release, "description": says, "visibility": "PRIVATE", **owner,
            },
            "source": {
                "modelId": model_id, "setName": source_set, "visibility": "PRIVATE",
                "dataset": ", ".join(Path(s).name for s in json.loads(meta["sources"])),
                "id": source, "num_prompts": int(meta["rows"]),
                "num_tokens_in_prompt": json.loads(meta["options"])["window"],
                "hfRepoId": None, "hfFolderId": None, "creatorId": creator,
            },
        }  # fmt: skip
        for name, row in files.items():
            (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    return out / model_id / source


def _contexts(store: FeatureStore, feature: int, limit: int) -> list[Context]:
    return [*store.contexts(feature, "top", limit), *store.contexts(feature, "sample", limit)]


def _feature(f: Feature, creator: str) -> dict:
    edges = f.histogram["edges"]
    return {
        "index": str(f.id),
        "creatorId": creator,
        "maxActApprox": f.max,
        "frac_nonzero": f.frequency,
        "freq_hist_data_bar_heights": f.histogram["counts"],
        "freq_hist_data_bar_values": [(a + b) / 2 for a, b in itertools.pairwise(edges)],
        "hasVector": False,
        "vector": [],
        **{name: [] for name in _EMPTY},
    }


_EMPTY = (
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "neg_str", "neg_values",
    "pos_str", "pos_values", "neuron_alignment_indices", "neuron_alignment_values",
    "neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_pearson",
    "correlated_neurons_l1", "topkCosSimIndices", "topkCosSimValues", "decoder_weights_dist",
)  # fmt: skip


def _activation(c: Context, creator: str) -> dict:
    largest = max(c.activations)
    return {
        "id": _id("activation", c.id),
        "index": str(c.feature),
        "tokens": c.tokens,
        "values": c.activations,
        "maxValue": largest,
        "maxValueTokenIndex": c.activations.index(largest),
        "minValue": min(c.activations),
        "qualifyingTokenIndex": len(c.tokens) - 1,
        "dataSource": None,
        "dataIndex": None,
        "dfaValues": [],
        "lossValues": [],
        "creatorId": creator,
    }


def _explanation(x: Label, creator: str) -> dict:
    return {
        "id": _id("explanation", f"{x.feature} {x.method}"),
        "index": str(x.feature),
        "description": x.label if x.explanation is None else f"{x.label}: {x.explanation}",
        "authorId": creator,
        "typeName": None,
        "explanationModelName": x.method,
    }


def _id(kind: str, name: object) -> str:
    """25 characters that name a row, the same in every export of one database."""
    return "c" + hashlib.sha256(f"{kind} {name}".encode()).hexdigest()[:24]


def _write(path: Path, rows: Iterable[dict], key: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(key | row) + "\n" for row in rows)
