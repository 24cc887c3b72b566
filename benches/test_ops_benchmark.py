"""The op suite under pytest-benchmark: `pytest benches --benchmark-only`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import ops

SHAPE = (256, 576, 9216, 27)


@pytest.mark.parametrize("name", ["GEMM alone", "published dense", "sarm, reference", "sarm"])
def test_encode_and_score(benchmark, name):
    benchmark(ops.candidates("cpu", *SHAPE)[name])
