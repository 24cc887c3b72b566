"""What is shown, what is held out, and that negatives are none."""

import chat_endpoint
import pytest

from sarm.features import FeatureStore
from sarm.features.background import background
from sarm.labels.contexts import Sampling, Splits


@pytest.mark.parametrize("how", [Sampling(), Sampling(shown=3, held_out=5), Sampling(seed=1)])
def test_no_context_is_on_two_sides(store, how):
    for feature in range(4):
        part = Splits(store, how)(feature)
        assert 0 < len(part.shown) <= how.shown
        assert len(part.held_out) == len(part.negatives) == min(how.held_out, 8)
        sides = [part.shown, part.held_out, part.negatives]
        for name in ("source", "text"):
            values = [getattr(c, name) for side in sides for c in side]
            assert len(set(values)) == len(values)


def test_shown_are_the_largest_and_held_out_the_sampled(store):
    part = Splits(store, Sampling())(0)
    assert [c.activation for c in part.shown] == [20.0 - i for i in range(8)]
    assert {c.kind for c in part.held_out} == {"sample"}


def test_negatives_are_exactly_inactive(tmp_path):
    path = chat_endpoint.make_database(tmp_path / "d.db", dense=(2,))
    with FeatureStore(path) as store:
        active = {r.source: r.active for r in background(store)}
        for feature in range(4):
            negatives = Splits(store, Sampling(held_out=8))(feature).negatives
            assert all(feature not in active[c.source] for c in negatives)
            # a feature that is active in every response has none: no score rather than a wrong one
            assert len(negatives) == (0 if feature == 2 else 8)


def test_at_most_half_is_held_out(tmp_path):
    path = chat_endpoint.make_database(tmp_path / "d.db", contexts=1)
    with FeatureStore(path) as store:
        part = Splits(store, Sampling())(0)
        assert (len(part.shown), len(part.held_out)) == (1, 1)


def test_the_threshold_counts(store):
    part = Splits(store, Sampling(threshold=15.5))(0)
    assert {c.activation for c in [*part.shown, *part.held_out]} == {16.0, 17.0, 18.0, 19.0, 20.0}


def test_the_split_is_the_same_every_time_and_another_by_seed(store):
    ids = [[c.id for c in Splits(store, Sampling(3, 4, seed=s))(1).held_out] for s in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
