"""Balanced accuracy and its interval."""

import numpy as np
import pytest
from scipy.stats import binomtest

from sarm.labels.detection import Detection, judged, wilson


@pytest.mark.parametrize(("count", "of"), [(0, 10), (10, 10), (7, 20), (1, 1)])
def test_wilson_is_scipys(count, of):
    expected = binomtest(count, of).proportion_ci(method="wilson")
    assert wilson(count, of) == pytest.approx((expected.low, expected.high))


def test_balanced_accuracy_by_hand():
    truth = [True] * 4 + [False] * 10
    said = [True, True, True, None] + [False] * 8 + [True] * 2
    found = judged(zip(truth, said, strict=True))
    assert found == Detection(hits=3, positives=3, rejections=8, negatives=10, unjudged=1)
    assert found.accuracy == pytest.approx((1 + 0.8) / 2)


def test_guessing_one_class_is_chance():
    for answer in (True, False):
        found = judged([(i < 5, answer) for i in range(50)])
        assert found.accuracy == 0.5


def test_a_class_without_contexts_has_no_score():
    assert judged([(True, True)]).accuracy is None
    assert judged([(True, True), (False, None)]).details()["interval"] is None
    assert judged([]).accuracy is None


def test_a_perfect_score_is_not_certain():
    low, high = Detection(10, 10, 10, 10).interval
    assert high == 1.0
    assert 0.75 < low < 0.90


def test_the_interval_covers_at_its_level():
    rng = np.random.default_rng(0)
    p, q, n = 0.9, 0.7, 20
    hits, rejections = rng.binomial(n, p, 2000), rng.binomial(n, q, 2000)
    inside = 0
    for h, r in zip(hits.tolist(), rejections.tolist(), strict=True):
        low, high = Detection(h, n, r, n).interval
        inside += low <= (p + q) / 2 <= high
    assert 0.93 <= inside / 2000 <= 0.98
