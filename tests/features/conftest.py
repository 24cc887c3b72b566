"""Tiny SARMs over real text, and preference files to collect features from."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tiny_sarm

import sarm
from sarm.features.collect import CollectOptions, collect

OPTIONS = CollectOptions(contexts=3, window=12, block=4)


@pytest.fixture(scope="session")
def tiny_scorer(tmp_path_factory):
    """made(seed, **options of the SAE) -> a scorer with a random SAE and head."""
    folder = tiny_sarm.save_backbone(tmp_path_factory.mktemp("features") / "backbone")

    def made(seed=0, n_latents=64, k=6, quantization=None, **options):
        backbone = sarm.load_backbone(
            folder, dtype=torch.float32, device="cpu", quantization=quantization
        )
        torch.manual_seed(seed)
        sae = sarm.TopKSAE(32, n_latents, k, **options)
        head = torch.randn(1, n_latents)
        model = sarm.SarmForSequenceClassification.from_parts(backbone, sae, head)
        return sarm.SARMScorer(model, tiny_sarm.make_tokenizer(), prefix_cache_mib=0)

    return made


@pytest.fixture(scope="session")
def scorer(tiny_scorer):
    return tiny_scorer()


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A file of 14 preference pairs: four blocks."""
    rows = tiny_sarm.make_pairs(14)
    return tiny_sarm.write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def database(scorer, pairs, tmp_path_factory):
    """The features of `pairs`, collected in one go."""
    out = tmp_path_factory.mktemp("database") / "features.db"
    collect(scorer, [pairs], out, OPTIONS)
    return out
