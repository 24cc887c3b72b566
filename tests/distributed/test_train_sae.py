"""SAE training in 2 and 4 processes: what one process learns, and checkpoints for any number."""

from dataclasses import replace

import pytest
import torch
from distributed_jobs import train_sae

from sarm.checkpoint import load_sae
from sarm.training.sae import SaeTrainConfig

CONFIG = SaeTrainConfig(
    n_latents=64, k=4, activations="turn-end", chat=True, context=128, chunk_states=24,
    passes=2, batch_size=15, dead_after=10, k_aux=8, multi_topk=True, seed=3,
)  # fmt: skip
# a step's gradients are sums in another order; Adam turns a last bit into up to 1e-7 of a weight
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def alone(backbone_dir, tmp_path_factory):
    """(losses, report, weights) of one process, by config."""
    known = {}

    def run(config):
        if config not in known:
            out = tmp_path_factory.mktemp("alone")
            losses, report = train_sae(backbone_dir, out, config, conversations=True)
            known[config] = losses, report, load_sae(out).state_dict()
        return known[config]

    return run


def check_equal(out, losses, report, expected):
    torch.testing.assert_close(losses, expected[0], rtol=1e-4, atol=1e-6)
    for name, weight in load_sae(out).state_dict().items():
        torch.testing.assert_close(weight, expected[2][name], **TOLERANCE, msg=name)
    for name in ("states", "tokens", "steps", "dead", "alive_scored"):
        assert getattr(report, name) == pytest.approx(getattr(expected[1], name)), name
    for name in ("fvu", "normalized_mse"):
        assert getattr(report, name) == pytest.approx(getattr(expected[1], name), rel=1e-4), name


@pytest.mark.parametrize(
    ("size", "shards", "settings"),
    [
        (2, 1, {}),
        (2, 2, {"dead_latents": "resample"}),
        (4, 2, {}),
        (4, 4, {}),
    ],
    ids=["2 data ranks", "2 shards, resampling", "2 x 2", "4 shards"],
)
def test_many_processes_learn_what_one_does(
    launch, alone, backbone_dir, tmp_path, size, shards, settings
):
    config = replace(CONFIG, **settings)
    results = launch(train_sae, size, backbone_dir, tmp_path, config, shards, None, True)
    losses, report = results[0]
    assert all(theirs == losses for theirs, _ in results)  # to the bit
    check_equal(tmp_path, losses, report, alone(config))


@pytest.mark.parametrize(
    ("before", "after"), [((2, 2), (1, 1)), ((2, 1), (4, 4))], ids=["2 -> 1", "2 -> 4"]
)
def test_a_killed_run_goes_on_with_another_number_of_processes(
    launch, alone, backbone_dir, tmp_path, before, after
):
    step = 2 * len(alone(CONFIG)[0]) // 3
    started = launch(train_sae, before[0], backbone_dir, tmp_path, CONFIG, before[1], step, True)
    assert [r[1] for r in started] == [None] * before[0]
    assert not (tmp_path / "sae.safetensors").exists()
    losses, report = launch(
        train_sae, after[0], backbone_dir, tmp_path, CONFIG, after[1], None, True
    )[0]
    assert len(losses) < len(alone(CONFIG)[0])  # it did not begin again
    expected = alone(CONFIG)
    check_equal(tmp_path, losses, report, (expected[0][-len(losses) :], *expected[1:]))
