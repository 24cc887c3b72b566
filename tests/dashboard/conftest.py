"""A tiny SARM with a feature database, an evaluation set and a folder for profiles."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tiny_sarm

import sarm
from sarm.dashboard.sets import EvaluationSet, read_set
from sarm.dashboard.views import Views
from sarm.evaluation.profiles import latent_sets
from sarm.features import FeatureStore
from sarm.features.collect import CollectOptions, collect
from sarm.tokens import ConversationEncoder

MARKUP = "<img src=x onerror=\"document.title='pwned'\">"


@pytest.fixture(scope="session")
def tiny_scorer(tmp_path_factory):
    """made(seed) -> a scorer with a random SAE of 64 latents and a random head."""
    folder = tiny_sarm.save_backbone(tmp_path_factory.mktemp("page") / "backbone")

    def made(seed=0):
        backbone = sarm.load_backbone(folder, dtype=torch.float32, device="cpu")
        torch.manual_seed(seed)
        sae = sarm.TopKSAE(32, 64, 6)
        model = sarm.SarmForSequenceClassification.from_parts(backbone, sae, torch.randn(1, 64))
        return sarm.SARMScorer(model, tiny_sarm.make_tokenizer(), prefix_cache_mib=0)

    return made


@pytest.fixture(scope="session")
def page_scorer(tiny_scorer):
    return tiny_scorer()


@pytest.fixture(scope="session")
def page_pairs(tmp_path_factory):
    """20 pairs; the answers of one hold markup, and so do contexts collected from them."""
    rows = tiny_sarm.make_pairs(20)
    rows[3]["chosen"][0]["content"] += " " + MARKUP
    return tiny_sarm.write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def page_database(page_scorer, page_pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("database") / "features.db"
    collect(page_scorer, [page_pairs], out, CollectOptions(contexts=8, window=24, block=8))
    with FeatureStore(out, "rw") as store:
        strongest = store.features("contribution", 1)[0].id
        store.add_label(strongest, "test", f"rainfall {MARKUP}")
    return out


@pytest.fixture(scope="session")
def page_set(page_scorer, page_pairs):
    encoder = ConversationEncoder(page_scorer.tokenizer, page_scorer.max_length)
    (latents,) = latent_sets(page_scorer.model, encoder, [read_set(str(page_pairs))])
    return EvaluationSet(page_scorer.model, latents)


@pytest.fixture
def views(page_scorer, page_database, page_set, tmp_path):
    with FeatureStore(page_database) as store:
        folder = tmp_path / "profiles"
        yield Views(page_scorer, "tiny", store, [page_set], folder)
