"""The op cases under pytest-benchmark, small: `pytest benches --benchmark-only`."""

from __future__ import annotations

import cases
import pytest
import torch
from suite import Missing, Shape

SHAPE = Shape(64, 256, 4096, 32)
NAMES = [
    (case, name)
    for case, candidates in cases.CASES.items()
    for name in candidates(cases.Problem(Shape(1, 1, 1, 1), "fp32", "cpu"))
]


@pytest.mark.parametrize(("case", "name"), NAMES)
def test_case(benchmark, case, name):
    torch.compiler.reset()
    benchmark.group = case
    call = cases.build(case, SHAPE, "fp32", "cpu", name)
    if isinstance(call, Missing):
        pytest.skip(call)
    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
