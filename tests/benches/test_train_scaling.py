"""Suite train-scaling: its table and plot from given times (a run starts processes on a model)."""

import pytest
import train_scaling
from suite import BenchError, Options
from tables import cells


@pytest.fixture
def rows(monkeypatch):
    seconds = {(1, 1): 8.0, (2, 1): 5.0, (2, 2): 4.0}
    monkeypatch.setattr(train_scaling.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(
        train_scaling, "launch", lambda world, shards, device: (seconds[world, shards], 4000)
    )
    return train_scaling.run(Options(runs=3))


def test_rows_compare_with_one_process(rows):
    found = {row.name: row for row in rows}
    assert list(found) == ["1 process", "2 processes, data", "2 processes, latents"]
    assert found["1 process"].ratios == {}
    assert found["2 processes, latents"].ratios["1 process"].value == pytest.approx(0.5)
    assert found["2 processes, data"].accuracy["tokens_per_s"] == pytest.approx(800)
    assert found["2 processes, data"].note == "800 tokens/s, 1.60x 1 process"
    assert cells(found["2 processes, latents"])["times 1 process"] == "2.00 (2.00-2.00)"


def test_the_plot_is_drawn(rows, tmp_path):
    train_scaling.plot(rows, tmp_path / "scaling.svg")
    assert "perfect" in (tmp_path / "scaling.svg").read_text("utf-8")
    train_scaling.plot(rows[1:2], tmp_path / "one.svg")  # as --only leaves them


def test_one_core_is_refused(monkeypatch):
    monkeypatch.setattr(train_scaling.os, "cpu_count", lambda: 1)
    with pytest.raises(BenchError, match="needs two processes"):
        train_scaling.run(Options())
