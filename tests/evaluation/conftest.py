"""A tiny trained SARM on disk."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tiny_sarm

from sarm.backbone import load_backbone, load_tokenizer
from sarm.data import Record, to_pair
from sarm.sae import TopKSAE
from sarm.states import StateCache
from sarm.tokens import ConversationEncoder
from sarm.training.reward import save_reward, train_reward


@pytest.fixture(scope="session")
def sarm_dir(tmp_path_factory):
    """A SARM and its dense probe, fitted on planted pairs; cache.sqlite holds its states."""
    folder = tmp_path_factory.mktemp("tiny")
    backbone_dir = tiny_sarm.save_backbone(folder / "backbone")
    backbone, tokenizer = load_backbone(backbone_dir), load_tokenizer(backbone_dir)
    torch.manual_seed(0)
    pairs = [to_pair(Record(str(i), row)) for i, row in enumerate(tiny_sarm.make_pairs(120))]
    encoder = ConversationEncoder(tokenizer, 512)
    with StateCache(folder / "cache.sqlite", backbone) as cache:
        fit = train_reward(backbone, TopKSAE(32, 128, 8), pairs, encoder, cache)
    save_reward(fit, tokenizer, folder / "rm")
    return folder / "rm"
