"""Exports, read back by readers of our own that follow the formats' definitions."""

import gzip
import json

import numpy as np
import pytest
from safetensors import safe_open

import sarm
from sarm.data import read_preferences
from sarm.errors import InputError
from sarm.features import FeatureStore
from sarm.features.delphi import export_delphi
from sarm.features.neuronpedia import export_neuronpedia


def read_delphi(folder):
    """{(sequence, position, latent): activation}, tokens, config: as delphi's TensorBuffer does."""
    found, tokens, edges = {}, None, []
    for path in folder.glob("*.safetensors"):
        first, last = map(int, path.stem.split("_"))
        edges.append((first, last))
        with safe_open(path, "np") as file:
            locations, activations = (
                file.get_tensor("locations"),
                file.get_tensor("activations"),
            )
            assert (locations.dtype, activations.dtype) == (np.uint16, np.float16)
            assert (np.diff(locations[:, 0].astype(int)) >= 0).all()
            if tokens is not None:
                assert (file.get_tensor("tokens") == tokens).all()
            tokens = file.get_tensor("tokens")
        assert locations[:, 2].max() <= last - first
        for (row, token, latent), value in zip(
            locations.astype(int).tolist(), activations.tolist(), strict=True
        ):
            found[row, token, latent + first] = value
    return found, tokens, sorted(edges), json.loads((folder / "config.json").read_text())


def test_delphi_holds_every_activation_of_every_tail(scorer, pairs, tmp_path):
    count = export_delphi(
        scorer, [str(pairs)], tmp_path / "d", responses=9, window=40, splits=3, model_name="m"
    )
    assert count == 9
    (folder,) = (tmp_path / "d").iterdir()
    assert folder.name == "layers.1"  # the output of the second of four layers
    found, tokens, edges, config = read_delphi(folder)
    assert edges == [(0, 20), (21, 41), (42, 63)]
    assert tokens.shape == (9, 40)
    assert (config["ctx_len"], config["n_tokens"], config["model_name"]) == (40, 360, "m")
    sides = [s for pair in read_preferences(pairs) for s in (pair.chosen, pair.rejected)][:9]
    expected = {}
    for row, turns in enumerate(sides):
        (encoded,) = scorer.encode([turns])
        ids = encoded.ids[-40:]
        shift = 40 - len(ids)
        assert tokens[row].tolist() == [scorer.tokenizer.pad_token_id] * shift + ids
        for at in range(len(ids)):
            upto = encoded.ids[: len(encoded.ids) - len(ids) + at + 1]
            ((_, state),) = scorer._states([upto])
            latents = scorer.model.sae.encode(state)
            for latent, value in zip(
                latents.idx[0].tolist(), latents.vals[0].tolist(), strict=True
            ):
                expected[row, at + shift, latent] = value
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        assert found[place] == pytest.approx(value, rel=2e-3, abs=1e-3)  # fp16


def read_lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_neuronpedia_rows_are_the_database(database, tmp_path):
    copy = tmp_path / "f.db"
    copy.write_bytes(database.read_bytes())
    with FeatureStore(copy, "rw") as store:
        store.add_label(3, "tf-idf", "cats", "sits on mats")
        folder = export_neuronpedia(store, tmp_path / "np", model_id="tiny", creator="me")
        features = store.features("id", alive=False)
        contexts = {
            f.id: [*store.contexts(f.id), *store.contexts(f.id, "sample")] for f in features
        }
    assert folder == tmp_path / "np" / "tiny" / "2-sarm"
    rows = read_lines(folder / "features" / "batch-0.jsonl.gz")
    assert [r["index"] for r in rows] == [str(f.id) for f in features]
    for row, f in zip(rows, features, strict=True):
        assert (row["modelId"], row["layer"], row["creatorId"]) == ("tiny", "2-sarm", "me")
        assert (row["maxActApprox"], row["frac_nonzero"]) == (f.max, f.frequency)
        assert row["freq_hist_data_bar_heights"] == f.histogram["counts"]
        assert len(row["freq_hist_data_bar_values"]) == len(f.histogram["counts"])
    activations = read_lines(folder / "activations" / "batch-0.jsonl.gz")
    assert len({a["id"] for a in activations}) == len(activations)
    for f in features:
        own = [a for a in activations if a["index"] == str(f.id)]
        assert [a["tokens"] for a in own] == [c.tokens for c in contexts[f.id]]
        for a in own:
            assert len(a["values"]) == len(a["tokens"])
            assert a["values"][a["maxValueTokenIndex"]] == a["maxValue"] == max(a["values"])
            assert a["minValue"] == min(a["values"])
    (label,) = read_lines(folder / "explanations" / "batch-0.jsonl.gz")
    assert (label["index"], label["description"]) == ("3", "cats: sits on mats")
    source = json.loads((folder / "source.jsonl").read_text())
    assert (source["id"], source["num_prompts"]) == ("2-sarm", 28)
    for name in ("model", "release", "sourceset"):
        assert json.loads((folder / f"{name}.jsonl").read_text())["creatorId"] == "me"


def test_bad_exports(database, scorer, pairs, tmp_path):
    (tmp_path / "there").mkdir()
    with FeatureStore(database) as store:
        with pytest.raises(InputError, match="exists already"):
            export_neuronpedia(store, tmp_path / "there", model_id="x")
        with pytest.raises(InputError, match="model id: expected letters"):
            export_neuronpedia(store, tmp_path / "new", model_id="../x")
    half = FeatureStore(tmp_path / "half.db", "rw")
    with half, pytest.raises(InputError, match="not been finished"):
        export_neuronpedia(half, tmp_path / "new", model_id="x")
    with pytest.raises(InputError, match="exists already"):
        export_delphi(scorer, [str(pairs)], tmp_path / "there")
    with pytest.raises(InputError, match="window must be at least 1, got 0"):
        export_delphi(scorer, [str(pairs)], tmp_path / "new", window=0)
    assert not (tmp_path / "new").exists()


def test_delphi_without_a_tokenizer(scorer, pairs, tmp_path):
    none = sarm.SARMScorer(scorer.model, None)
    with pytest.raises(InputError, match="tokenizer"):
        export_delphi(none, [str(pairs)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
