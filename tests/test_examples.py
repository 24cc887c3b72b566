"""Examples that need no server and no trainer."""

import importlib.util
import json
from pathlib import Path

import pytest

PLOT = Path(__file__).parents[1] / "examples" / "plot_metrics.py"


def test_the_curves_of_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("plot_metrics", PLOT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [{"step": s, "fvu": 1 / s, "fvu/scored": 2 / s, "dead": 0.0} for s in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module.plot(tmp_path / "metrics.jsonl", tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text("utf-8")
    assert "fvu/scored" in drawn
    assert "dead" not in drawn  # never above 0: nothing to draw on a logarithmic axis
