"""Suite train-scaling: its table and plot from given times (a run starts processes on a model)."""

import pytest
import train_scaling
from suite import BenchError, Options


@pytest.fixture
def rows(monkeypatch):
    seconds = {(1, 1): 8.0, (2, 1): 5.0, (2, 2): 4.0}
    monkeypatch.setattr(train_scaling.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(
        train_scaling, "launch", lambda world, shards, device: (seconds[world, shards], 4000)
    )
    return train_scaling.run(Options(runs=3))


def test_rows_compare_with_one_process(rows):
    found = {(row.case, row.name): row for row in rows}
    assert list(found) == [
        ("train-sae, data", "1"), ("train-sae, data", "2"), ("train-sae, latents", "2"),
    ]  # fmt: skip
    assert found["train-sae, data", "1"].ratios == {}
    assert found["train-sae, latents", "2"].ratios["1"].value == pytest.approx(0.5)
    assert found["train-sae, data", "2"].note == "800 tokens/s"


def test_the_plot_is_drawn(rows, tmp_path):
    train_scaling.plot(rows, tmp_path / "scaling.svg")
    assert "perfect" in (tmp_path / "scaling.svg").read_text("utf-8")


def test_one_core_is_refused(monkeypatch):
    monkeypatch.setattr(train_scaling.os, "cpu_count", lambda: 1)
    with pytest.raises(BenchError, match="needs two processes"):
        train_scaling.run(Options())
