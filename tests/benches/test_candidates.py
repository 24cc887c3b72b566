"""What is timed side by side computes the same."""

import sys

import baselines
import cases
import pytest
import torch
from accuracy import Exact
from suite import DTYPES, Missing, Shape

SHAPE = Shape(12, 24, 160, 6)
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}  # of the largest entry


def results(case, dtype):
    """Candidate to results, without the floors and without compiling."""
    candidates = cases.CASES[case](cases.Problem(SHAPE, dtype, "cpu"))
    skipped = (*cases.FLOORS, cases.COMPILED)
    return {
        name: call if isinstance(call, Missing) else call()
        for name, call in candidates.items()
        if name not in skipped
    }


def error(ours, theirs):
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# In bf16 two correct encoders may choose different latents where values are nearly equal, so only
# the cases that are given the latents are compared there.
GIVEN = ("sparse_value", "gather_sum", "gather_dot", "scatter_outer")
AGREEING = [(c, "fp32") for c in ("sae_step", "encode_value", *GIVEN)] + [
    (c, "bf16") for c in GIVEN
]


@pytest.mark.parametrize(("case", "dtype"), AGREEING)
def test_candidates_agree(case, dtype):
    found = results(case, dtype)
    expected = found.pop(cases.PUBLISHED)
    assert cases.SARM in found
    for name, result in found.items():
        if isinstance(result, Missing):
            continue
        pairs = zip(result, expected, strict=True) if case == "sae_step" else [(result, expected)]
        for ours, theirs in pairs:
            assert ours.shape == theirs.shape, name
            assert error(ours, theirs) < TOLERANCE[dtype], name


def test_encoders_agree():
    found = {name: r for name, r in results("topk_encode", "fp32").items() if r}
    vals, idx = found.pop(cases.PUBLISHED)
    assert cases.SARM in found
    for name, result in found.items():
        if isinstance(result, Missing):
            continue
        theirs, order = result[0].sort(dim=1, descending=True)  # sparsify does not sort
        assert torch.equal(result[1].gather(1, order), idx), name
        assert error(theirs, vals) < TOLERANCE["fp32"], name


def test_sparsify_is_compared_when_installed():
    pytest.importorskip("natsort")  # of its dependencies, the one nothing else brings
    pytest.importorskip("schedulefree")
    assert not isinstance(results("topk_encode", "fp32")[cases.SPARSIFY], Missing)


def test_compiled_baseline_computes_the_published_values():
    candidates = cases.CASES["topk_encode"](cases.Problem(SHAPE, "fp32", "cpu"))
    vals, idx = candidates[cases.COMPILED]()
    expected, expected_idx = candidates[cases.PUBLISHED]()
    assert torch.equal(idx, expected_idx)
    assert error(vals, expected) < TOLERANCE["fp32"]


def test_an_absent_sparsify_is_a_row_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sparsify", None)
    baselines.sparsify.cache_clear()
    try:
        assert "pip install sarm[bench]" in results("topk_encode", "fp32")[cases.SPARSIFY]
    finally:
        baselines.sparsify.cache_clear()


def test_accuracy_counts_wrong_values_and_wrong_indices():
    problem = cases.Problem(SHAPE, "fp32", "cpu")
    exact = Exact(problem)
    vals, idx = cases.CASES["topk_encode"](problem)[cases.SARM]()
    right = exact.compare(vals, idx)
    assert right["error"] < 1e-6
    assert right["agree"] == 1.0
    assert exact.compare(vals * 1.01, idx)["error"] > 5e-3
    worst = exact.pre.argmin(dim=1, keepdim=True)
    wrong = torch.cat([idx[:, 1:], worst], dim=1)
    assert exact.compare(vals, wrong)["agree"] == pytest.approx(5 / 6)


def test_problem_has_the_asked_dtypes():
    for name, dtype in DTYPES.items():
        problem = cases.Problem(SHAPE, name, "cpu")
        assert problem.x.dtype == problem.w_enc.dtype == problem.b_enc_cast.dtype == dtype
        assert problem.b_enc.dtype == torch.float32
