"""Puts tests/helpers on the path (importmode importlib does not) and gives a tiny backbone."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tiny_sarm

from sarm.backbone import load_backbone

ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "gemma2": {},
    "mistral-sliding": {"sliding_window": 12},
    "gemma2-sliding": {"sliding_window": 12},
}


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_sarm.make_tokenizer()


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory):
    return tiny_sarm.save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def backbone(backbone_dir):
    return load_backbone(backbone_dir)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def any_backbone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    kind = request.param.split("-")[0]
    return load_backbone(tiny_sarm.save_backbone(folder, kind, **ARCHITECTURES[request.param]))
