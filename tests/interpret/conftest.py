"""Tiny scorers with a random SAE and head."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tiny_sarm

import sarm


@pytest.fixture(scope="session")
def explained(tmp_path_factory):
    """made(activation, quantization) -> a scorer."""
    folder = tiny_sarm.save_backbone(tmp_path_factory.mktemp("interpret") / "backbone")

    def made(activation="topk", quantization=None, seed=0):
        backbone = sarm.load_backbone(
            folder, dtype=torch.float32, device="cpu", quantization=quantization
        )
        torch.manual_seed(seed)
        if activation == "jumprelu":
            sae = sarm.sae.ThresholdSAE(32, 64, 6)
            sae.threshold.fill_(0.5)
        else:
            sae = sarm.TopKSAE(32, 64, 6, relu=activation == "topk_relu")
        torch.nn.init.normal_(sae.latent_bias, std=0.3)
        head = torch.randn(1, 64)
        model = sarm.SarmForSequenceClassification.from_parts(backbone, sae, head, activation)
        return sarm.SARMScorer(model, tiny_sarm.make_tokenizer(), prefix_cache_mib=0)

    return made


@pytest.fixture(scope="session")
def talk():
    """talk("question", "answer") -> messages."""

    def made(prompt, response):
        return [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]

    return made
