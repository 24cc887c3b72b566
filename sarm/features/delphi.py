"""Activations as EleutherAI's delphi caches them, for its explainers and scorers.

A folder a hookpoint, in it `{first}_{last}.safetensors` for ranges of latents (last included):

    locations    (n, 3) uint16, or uint32 where that is too narrow: sequence, position, and the
                 latent less the file's first
    activations  (n,) fp16: of these places; everything else is zero
    tokens       (sequences, ctx_len) int64: the same in every file

and `config.json`: delphi's CacheConfig and `model_name`, from which it loads the tokenizer.

delphi takes any sequence without a location for an example where the latent is silent, so this is a
pass over responses, not a copy of the contexts in a feature database: the last `window` tokens of
every response with all their active features. Responses shorter than that are filled up on the left
with the padding token, without locations.

Source: github.com/EleutherAI/delphi, delphi/latents/cache.py (`save_splits`, `save_config`) and
loader.py (`TensorBuffer.load`), delphi/config.py (`CacheConfig`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sarm.checkpoint import replace_files
from sarm.data import BadRecords
from sarm.errors import InputError
from sarm.features.rows import read_all, responses_of
from sarm.features.tails import encoded_tails
from sarm.scorer import SARMScorer

#: Below this an activation counts as zero, as in delphi.
SILENT = 1e-5


def export_delphi(
    scorer: SARMScorer,
    sources: Sequence[str],
    out: str | Path,
    *,
    responses: int = 2000,
    window: int = 64,
    splits: int = 5,
    model_name: str = "",
    block: int = 128,
    bad: BadRecords | None = None,
) -> int:
    """Write the cache of at most `responses` responses; returns how many they were.

    Memory: responses x window x k x 12 bytes (300 MB at 2,000 x 64 x 192). `out` holds a folder
    named after the layer; it appears when it is whole.

    Raises:
        InputError: malformed record, no usable response, `out` exists, a count below 1.
    """
    bad, out = bad or BadRecords(), Path(out)
    counts = {"responses": responses, "window": window, "splits": splits}
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} must be at least 1, got {count}")
    if scorer.tokenizer is None:
        raise InputError("export: the model has no tokenizer; delphi's cache is of its tokens")
    if out.exists():
        raise InputError(f"{out}: exists already; choose another folder")
    n_latents = scorer.model.sae.n_latents
    tokens: list[list[int]] = []
    places: list[np.ndarray] = []
    values: list[np.ndarray] = []
    pad = scorer.tokenizer.pad_token_id
    pad = scorer.tokenizer.eos_token_id if pad is None else pad  # without either, none is encoded
    records = read_all(sources, bad)
    while len(tokens) < responses and (some := list(itertools.islice(records, block))):
        rows: list[list[int]] = []
        for record in some:
            try:
                turns = [r.conversation for r in responses_of(record)]
                rows += [e.ids for e in scorer.encode(turns, lambda _: record.where)]  # noqa: B023
            except InputError as error:
                bad.report(str(error))
        rows = rows[: responses - len(tokens)]
        for ids, tail in zip(rows, encoded_tails(scorer, rows, window), strict=True):
            shift = window - len(tail.idx)
            token, column = np.nonzero(np.abs(tail.vals) > SILENT)
            latent = tail.idx[token, column].astype(np.int64)
            order = np.lexsort((latent, token))  # as torch.nonzero lists them
            sequence = np.full(len(token), len(tokens))
            places.append(np.stack([sequence, token + shift, latent], axis=1)[order])
            values.append(tail.vals[token, column][order].astype(np.float16))
            tokens.append([pad] * shift + list(ids[-window:]))
    if not tokens:
        raise InputError(f"{', '.join(sources)}: no usable response")
    locations, activations = np.concatenate(places), np.concatenate(values)
    hookpoint = f"layers.{scorer.model.config.sarm['source_layer'] - 1}"
    with replace_files(out) as staging:
        folder = Path(staging) / hookpoint
        folder.mkdir(parents=True)
        edges = np.linspace(0, n_latents, min(splits, n_latents) + 1).astype(np.int64)
        for first, end in itertools.pairwise(edges.tolist()):
            own = (locations[:, 2] >= first) & (locations[:, 2] < end)
            part = locations[own] - [0, 0, first]
            narrow = part.max(initial=0) < 2**16
            tensors = {
                "locations": part.astype(np.uint16 if narrow else np.uint32),
                "activations": activations[own],
                "tokens": np.array(tokens, np.int64),
            }
            save_file(tensors, folder / f"{first}_{end - 1}.safetensors")
        config = {
            "dataset_repo": ", ".join(sources),
            "dataset_split": "",
            "dataset_name": "",
            "dataset_row": "",
            "batch_size": block,
            "ctx_len": window,
            "n_tokens": len(tokens) * window,
            "n_splits": min(splits, n_latents),
            "model_name": model_name,
        }
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return len(tokens)
