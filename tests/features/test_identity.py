"""Fingerprints: what changes an activation changes `features`, what weighs it `head`."""

import copy

import pytest
import torch

from sarm.features import FeatureStore
from sarm.features.identity import identity


@pytest.fixture
def model(tiny_scorer):
    return tiny_scorer().model


def configured(model, **fields):
    other = copy.copy(model)
    other.config = copy.deepcopy(model.config)
    other.config.sarm.update(fields)
    return identity(other)


@pytest.mark.parametrize(
    "fields",
    [
        {"k": 7},
        {"source_layer": 1},
        {"activation": "topk_relu"},
        {"activation": "jumprelu"},
        {"activation": "none"},
        {"normalization": "layer_norm"},
        {"normalization": "constant_norm"},
        {"normalization": "none"},
    ],
)
def test_how_activations_are_made_is_part_of_it(model, fields):
    mine, other = identity(model), configured(model, **fields)
    assert mine["features"] != other["features"]
    assert mine["head"] == other["head"]


def test_every_two_ways_differ(model):
    ways = [
        configured(model, activation=a, normalization=n)["features"]
        for a in ("topk", "topk_relu", "jumprelu", "none")
        for n in ("token", "layer_norm", "constant_norm", "none")
    ]
    assert len(set(ways)) == len(ways)


@pytest.mark.parametrize("fields", [{"quantization": "int8"}, {"sae_dtype": "float32"}])
def test_how_numbers_are_held_is_not(model, fields):
    assert identity(model) == configured(model, **fields)


def test_weights_are_part_of_it(model):
    mine = identity(model)
    with torch.no_grad():
        model.score.weight[0, 3] *= 2
        steered = identity(model)
        model.sae.latent_bias[3] += 1
        trained = identity(model)
    assert steered["features"] == mine["features"]
    assert steered["head"] != mine["head"]
    assert trained["features"] != mine["features"]


def test_a_database_of_another_normalisation_is_refused(database, tiny_scorer):
    from sarm.errors import InputError

    other = tiny_scorer(normalization="layer_norm").model
    with (
        FeatureStore(database) as store,
        pytest.raises(InputError, match="another model: features"),
    ):
        store.check(other)
