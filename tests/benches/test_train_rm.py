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
        train_rm.sample_pairs(make_scorer(), Options(shortest=s), 1, 4)[1] for s in (0, 1)
    )
    longest = [max(max(map(len, p.ids)) for p in some) for some in (every, short)]
    assert longest[1] < longest[0]


def test_memory_is_measured_in_processes_of_their_own(batches, monkeypatch, make_scorer):
    asked, found = [], iter([40.0, None, 10.0])
    monkeypatch.setattr(train_rm, "peak_on_cpu", lambda *args: asked.append(args) or next(found))
    scorer, step = make_scorer(), batches[0]
    ways = [("published", "fp32"), ("published", "bf16"), ("sarm", "fp32")]
    rows = train_rm.peaks_of("mode 1, longest pair", scorer, step, 1, ways, Options())
    assert asked == [(train_rm._step, *way, 1, step) for way in ways]
    assert [row.peak_mib for row in rows] == [40.0, None, 10.0]
    learns = sum(p.numel() for p in scorer.model.model.parameters()) + scorer.model.sae.n_latents
    held = 4 * (2 * learns + sum(p.numel() for p in scorer.model.parameters())) / 2**20
    share = 100 * (10 + held) / (40 + held)
    assert rows[-1].note == f"{10 + held:.0f} MiB in all, {share:.0f} % of published"
    assert rows[1].note == ""


@pytest.mark.parametrize(("which", "expected"), [("longest", 60), ("typical", 20)])
def test_memory_is_that_of_the_longest_and_of_a_median_pair(
    which, expected, make_scorer, monkeypatch
):
    def pair(n, m):
        ids = (torch.ones(n).int().numpy(), torch.ones(m).int().numpy())
        return EncodedPair(ids, (0, 0), 0.0, "a pair")

    pairs = [pair(9, 20), pair(60, 3), pair(60, 30), pair(4, 2), pair(7, 5)]
    monkeypatch.setattr(train_rm, "make_scorer", lambda *args: make_scorer())
    monkeypatch.setattr(train_rm, "sample_pairs", lambda *args: ("title", pairs))
    steps = []
    monkeypatch.setattr(train_rm, "peak_on_cpu", lambda *args: steps.append(args[-1]) or 1.0)
    found = train_rm.run(Options(only=f"mode 3, {which} pair"))
    assert [row.name for row in found] == [way for way, _ in train_rm.WAYS]
    for short, other in steps:
        assert len(short.ids[0]) == 4
        assert max(map(len, other.ids)) == expected
        assert which == "typical" or len(other.ids[1]) == 30


def test_a_pattern_that_selects_nothing(capfd):
    with pytest.raises(SystemExit):
        run.main(["--suite", "train-rm", "--only", "x"])
    assert (
        "selects nothing; cases: mode 1; mode 3; mode 1, longest pair; " in capfd.readouterr().err
    )
