"""Differences of two data sets against numbers worked out by hand; two models by decoder."""

import math

import pytest
import tiny_sarm
import torch

from sarm.errors import InputError
from sarm.features import FeatureStore
from sarm.features.collect import CollectOptions, collect
from sarm.features.diff import diff, matched


@pytest.fixture(scope="module")
def other(scorer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    source = tiny_sarm.write_jsonl(folder / "p.jsonl", tiny_sarm.make_pairs(11, seed=3))
    collect(scorer, [source], folder / "f.db", CollectOptions(contexts=2))
    return folder / "f.db"


def test_z_and_shift(database, other):
    with FeatureStore(database) as a, FeatureStore(other) as b:
        found = diff(a, b)
        sides = [{f.id: f for f in s.features("id", alive=False)} for s in (a, b)]
        means = [float(s.meta["reward_mean"]) for s in (a, b)]
        by_shift = diff(a, b, "contribution")
    assert [abs(d.z) for d in found] == sorted((abs(d.z) for d in found), reverse=True)
    assert {d.feature for d in found} == {
        i for i in range(64) if sides[0][i].rows or sides[1][i].rows
    }
    for d in found:
        x, y = sides[0][d.feature].rows, sides[1][d.feature].rows
        p = (x + y) / 50  # 28 and 22 responses
        spread = math.sqrt(p * (1 - p) * (1 / 28 + 1 / 22))
        assert d.z == pytest.approx((y / 22 - x / 28) / spread if spread else 0.0)
    assert sum(d.shift for d in by_shift) == pytest.approx(means[1] - means[0], abs=1e-9)
    assert abs(by_shift[0].shift) == max(abs(d.shift) for d in by_shift)


def test_features_of_two_models_are_found_by_their_decoders():
    torch.manual_seed(0)
    first = torch.randn(50, 16)
    order = torch.randperm(50)
    second = first[order] * 3 + 0.01 * torch.randn(50, 16)
    second[order.argsort()[7]] = -first[7]  # lost
    pairs = matched(first, second)
    for i in range(50):
        partner, cosine, mutual = pairs[i]
        if i == 7:
            assert cosine < 0.9
        else:
            assert (order[partner].item(), mutual) == (i, True)
            assert cosine > 0.99
    with pytest.raises(InputError, match="cannot be matched"):
        matched(first, torch.randn(5, 8))


def test_different_models_and_unfinished_databases_are_refused(
    database, tiny_scorer, pairs, tmp_path
):
    strange = tiny_scorer(seed=4)
    collect(strange, [pairs], tmp_path / "s.db", CollectOptions(contexts=1))
    with FeatureStore(tmp_path / "h.db", "rw"):
        pass
    with FeatureStore(database) as a, FeatureStore(tmp_path / "s.db") as b:
        with pytest.raises(InputError, match="are of different models"):
            diff(a, b)
        with pytest.raises(InputError, match="order must be one of"):
            diff(a, a, "x")
        decoders = (torch.randn(64, 32), torch.randn(64, 32))
        assert all(d.cosine is not None for d in diff(a, b, decoders=decoders))
        with (
            FeatureStore(tmp_path / "h.db") as half,
            pytest.raises(InputError, match="not been finished"),
        ):
            diff(a, half)


def test_labels_of_two_models_are_each_ones_own(database, scorer, tiny_scorer, pairs, tmp_path):
    second = tiny_scorer(seed=1)
    collect(second, [pairs], tmp_path / "b.db", CollectOptions(contexts=2))
    decoders = tuple(s.model.sae.w_dec.detach() for s in (scorer, second))
    with FeatureStore(database) as a, FeatureStore(tmp_path / "b.db", "rw") as b:
        for i in range(64):
            b.add_label(i, "test", f"second's {i}")
        for d in diff(a, b, decoders=decoders):
            assert d.label == f"second's {d.partner}"
