"""Suite `train-rm`: both ways train alike, and the rows of a run."""

import pytest
import run
import torch
import train_rm
from suite import Options

from sarm.training.collate import EncodedPair


@pytest.fixture
def batches():
    draw = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(1, 60, (n,), generator=draw, dtype=torch.int32).numpy()

    rows = [(ids(n), ids(m)) for n, m in ((9, 5), (3, 12), (7, 7), (4, 6))]
    pairs = [EncodedPair(row, (2, 2), 0.0, f"pair {i}") for i, row in enumerate(rows)]
    return [pairs[:2], pairs[2:]]


@pytest.mark.parametrize("mode", [1, 3])
def test_every_way_has_the_same_losses(mode, make_scorer, batches, monkeypatch):
    monkeypatch.setattr(train_rm, "LR", 1e-2)
    model = make_scorer().model
    before = model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    ways = [way for way in train_rm.WAYS if way[1] == "fp32"]
    found = []
    for way in ways:
        with train_rm.training(*way, model, mode) as step:
            found.append([step(batch) for batch in batches])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[2] == pytest.approx(found[0], rel=2e-4)
    assert torch.equal(model.state_dict()["model.layers.0.mlp.up_proj.weight"], before)


def test_rows_of_a_run(make_scorer, batches):
    options = Options(runs=2)
    rows = train_rm.compare(
        "mode 1", "title", make_scorer().model, batches, 1, list(train_rm.WAYS), options
    )
    assert [(row.name, row.dtype) for row in rows] == list(train_rm.WAYS)
    sarm = rows[-1]
    assert sarm.ratios.keys() == {train_rm.PUBLISHED, train_rm.KEPT}
    assert sarm.note.startswith(f"{4e3 / sarm.ms:.2f} pairs/s, losses within ")


def test_the_shortest_pairs(make_scorer):
    every, short = (
        train_rm.make_batches(make_scorer(), Options(pairs=4, shortest=s), 1)[1] for s in (0, 1)
    )
    longest = [max(max(map(len, p.ids)) for b in some for p in b) for some in (every, short)]
    assert longest[1] < longest[0]


def test_memory_is_measured_in_processes_of_their_own(batches, monkeypatch, make_scorer):
    asked = []
    monkeypatch.setattr(train_rm, "peak_on_cpu", lambda *args: asked.append(args) or 3.0)
    row = train_rm.Row("mode 1", "title", "fp32", "sarm")
    train_rm.add_memory(row, 1, batches, Options(), make_scorer())
    assert asked == [(train_rm._step, "sarm", "fp32", 1, batches[0][1])]  # the longest pair
    assert row.peak_mib == 3.0
    assert row.note.endswith("MiB in all")


def test_a_pattern_that_selects_nothing(capfd):
    with pytest.raises(SystemExit):
        run.main(["--suite", "train-rm", "--only", "x"])
    assert "selects nothing; cases: mode 1, mode 3" in capfd.readouterr().err
