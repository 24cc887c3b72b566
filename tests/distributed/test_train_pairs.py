"""Reward training in 2 and 4 processes, DDP and FSDP2: the curve and the weights of one."""

import pytest
import torch
from distributed_jobs import train_pairs_of
from safetensors.torch import load_file

CURVE = ("loss", "bradley_terry", "reconstruction", "grad_norm", "learning_rate")
HELD_OUT = ("eval_accuracy", "eval_bradley_terry", "eval_difference")


@pytest.fixture(scope="module")
def alone(launch, backbone_dir, tmp_path_factory):
    """(log, folder) of one process, by mode."""
    known = {}

    def run(mode, valid=False):
        if (mode, valid) not in known:
            out = tmp_path_factory.mktemp("alone")
            (log,) = launch(train_pairs_of, 1, backbone_dir, out, mode, 22, False, None, valid)
            known[mode, valid] = log, out
        return known[mode, valid]

    return run


def curve(log, names):
    return [{n: entry[n] for n in names if n in entry} for entry in log if names[0] in entry]


def check_equal(log, out, expected):
    theirs, folder = expected
    for names in (CURVE, HELD_OUT):
        ours, other = curve(log, names), curve(theirs, names)
        assert len(ours) == len(other)
        for a, b in zip(ours, other, strict=True):
            assert a == pytest.approx(b, rel=2e-4, abs=2e-5)
    mine, whole = (load_file(f / "model.safetensors") for f in (out, folder))
    assert mine.keys() == whole.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=5e-5, msg=name)


@pytest.mark.parametrize(
    ("size", "mode", "fsdp", "valid"),
    [(2, 1, False, True), (2, 3, False, False), (2, 3, True, True), (4, 1, True, False)],
    ids=[
        "DDP 2, mode 1, evaluated",
        "DDP 2, mode 3",
        "FSDP2 2, mode 3, evaluated",
        "FSDP2 4, mode 1",
    ],
)
def test_the_curve_is_that_of_one_process(
    launch, alone, backbone_dir, tmp_path, size, mode, fsdp, valid
):
    # 22 pairs in steps of 8: the last step of an epoch leaves a process without pairs
    logs = launch(train_pairs_of, size, backbone_dir, tmp_path, mode, 22, fsdp, None, valid)
    check_equal(logs[0], tmp_path, alone(mode, valid))
    assert not (tmp_path / ".progress").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, True), (1, False)), ((2, False), (4, True))],
    ids=["FSDP2 2 -> 1", "DDP 2 -> FSDP2 4"],
)
def test_a_killed_run_goes_on_with_another_number_of_processes(
    launch, alone, backbone_dir, tmp_path, before, after
):
    arguments = (backbone_dir, tmp_path, 3, 22)
    assert launch(train_pairs_of, before[0], *arguments, before[1], 3) == [None] * before[0]
    (checkpoint,) = (tmp_path / ".progress").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-2"
    log = launch(train_pairs_of, after[0], *arguments, after[1])[0]
    check_equal(log, tmp_path, alone(3))
