"""What precision costs: measures that know right from wrong, and a run on a tiny model."""

import copy
import json

import agreement
import pytest
import run
import torch
import workload
from rounded import rounded
from suite import Missing, Options

import sarm
from sarm.evaluation import rules
from sarm.evaluation.metrics import Benchmark, Item, Measure
from sarm.packing import last_states


def test_measures():
    exact = torch.randn(40, 8)
    assert agreement.relative_error(exact, exact) == 0
    assert agreement.relative_error(1.1 * exact, exact) == pytest.approx(0.1, rel=1e-4)
    assert agreement.spearman(exact**3, exact) == pytest.approx(1)
    assert agreement.spearman(-exact[:, 0], exact[:, 0]) == pytest.approx(-1)
    half = torch.cat([exact[:, :1], -exact[:, :1]], dim=1)
    assert agreement.spearman(half, exact[:, [0, 0]]) == pytest.approx(0)


MEASURE = Measure("accuracy", {"accuracy": 1.0})


def pairs(chat, count):
    return [
        Item([chat(f"question {i}", "yes " * i), chat(f"question {i}", f"no {i}")], 1, "", str(i))
        for i in range(count)
    ]


def test_rows_of_a_run(make_scorer, chat):
    scorer = make_scorer()
    benchmark = Benchmark("pairs", pairs(chat, 6), rules.each(rules.pair), (MEASURE,))
    scorers = {
        "sarm fp32": scorer,
        "sarm bf16": workload.in_dtype(scorer, torch.bfloat16),
        "sarm int8": workload.in_int8(scorer),
        "sarm int4": Missing("not there"),
    }
    exact, half, int8, missing = agreement.compare(benchmark, scorers, Options())
    assert exact.shape == "pairs, 6 items, 12 rows"
    rewards = scorer.score([talk for item in benchmark.items for talk in item.conversations])
    better = (rewards[::2] > rewards[1::2]).double().mean().item()
    assert exact.accuracy["accuracy_percent"] == pytest.approx(100 * better)
    assert 0 <= exact.accuracy["packing_error"] < 1e-5
    assert int8.accuracy["packing_error"] == 0.0
    for row in (half, int8):
        assert 0 < row.accuracy["state_error"] < 0.2
        assert row.accuracy["spearman_probes"] > 0.9
        assert -1 <= row.accuracy["spearman"] <= 1
        points = row.accuracy["accuracy_percent"] - 100 * better
        assert row.accuracy["points"] == pytest.approx(points)
        assert row.accuracy["points_low"] <= points + 1e-6
        assert row.accuracy["points_high"] >= points - 1e-6
    ratio = int8.accuracy["state_error"] / half.accuracy["state_error"]
    assert int8.accuracy["error_over_bf16"] == pytest.approx(ratio)
    assert missing.note == "not there"


def test_what_is_not_quantised_is_a_row_that_says_why(make_scorer):
    found = workload.in_int8(make_scorer(kind="gemma2"))
    assert isinstance(found, Missing)
    assert "gemma2 is not supported" in found


def test_data_folder(tmp_path, capsys):
    answers = {"prompt": "q", "chosen": ["a"] * 3, "rejected": ["b"] * 3}
    (tmp_path / "rm_bench").mkdir()
    (tmp_path / workload.RM_BENCH).write_text(json.dumps([answers] * 4))
    (found,) = workload.benchmarks(Options(data=tmp_path, items=3))
    assert (found.name, len(found.items)) == ("RM-Bench chat", 3)
    assert len(workload.benchmarks(Options(data=tmp_path, items=0))[0].items) == 4
    assert workload.benchmarks(Options(items=5))[0].name == "demo pairs"
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        run.main(["--suite", "agreement", "--device", "cpu", "--items", "-1"])
    assert "--items must be >= 0, got -1" in capsys.readouterr().err


def test_rounded_fp32_is_as_far_off_as_bf16(backbone_dir):
    plain = sarm.load_backbone(backbone_dir(), device="cpu", dtype=torch.float32)
    rows = [torch.randint(300, (n,)).tolist() for n in range(5, 40)]
    exact = last_states(plain, rows)
    errors = [
        agreement.relative_error(last_states(model, rows), exact)
        for model in (rounded(plain), copy.deepcopy(plain).bfloat16())
    ]
    assert 0.5 < errors[0] / errors[1] < 1.5
    assert torch.equal(last_states(plain, rows), exact)  # the original is left alone
