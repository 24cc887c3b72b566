"""`sarm train-rm`: the options of its modes, what they write, and what is refused."""

import json

import pytest
import tiny_sarm
import torch

from sarm import SARMScorer
from sarm.training.end_to_end import WORK

SMALL = ["--epochs", 1, "--batch-size", 8, "--micro-batch", 4, "--limit", 16, "--lr", 1e-3]


@pytest.fixture
def ask(backbone_dir, trained, files, tmp_path):
    """Arguments of train-rm that write into tmp_path/rm."""

    def arguments(*options, sae=trained / "sae", preferences=files / "train.jsonl"):
        return ["train-rm", backbone_dir, sae, preferences, "-o", tmp_path / "rm", *options]

    return arguments


@pytest.fixture
def report(sarm, ask, tmp_path):
    """training.json of a run that must succeed, and what it printed."""

    def run(*options, **inputs):
        done = sarm(*ask(*options, **inputs))
        assert done.code == 0, done.err
        return json.loads((tmp_path / "rm" / "training.json").read_text()), done.out

    return run


def weights(folder):
    return SARMScorer.from_pretrained(folder, dtype=torch.float32).model.state_dict()


# ---- modes 0 to 3 --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "options", "parts"),
    [
        (0, [], {"bradley_terry"}),
        (1, ["--margin", "--centre", 0.01], {"bradley_terry"}),
        (2, ["--lr-head", 1e-2, "--weight-decay", 0], {"bradley_terry", "reconstruction"}),
        (3, ["--reconstruction", "last", "--reconstruction-weight", 0.5, "--checkpointing",
             "--kept-tokens", 40, "--lr-sae", 1e-2], {"bradley_terry", "reconstruction"}),
    ],
)  # fmt: skip
def test_modes(mode, options, parts, report, files, tmp_path):
    rows = [{**row, "margin": 0.1 + i} for i, row in enumerate(tiny_sarm.make_pairs(16))]
    path = tmp_path / "margins.jsonl"
    tiny_sarm.write_jsonl(path, rows)
    found, said = report("--mode", mode, *SMALL, *options, preferences=path)
    assert (found["mode"], found["pairs"], found["held_out"]) == (mode, 16, None)
    steps = [entry for entry in found["log"] if "loss" in entry]
    assert len(steps) == 2
    assert all({"bradley_terry", "reconstruction"} & set(step) == parts for step in steps)
    assert f"mode {mode}, 16 pairs (0 equal left out" in said
    assert not (tmp_path / "rm" / WORK).exists()
    assert weights(tmp_path / "rm")["score.weight"].count_nonzero() > 0


def test_from_a_sarm_its_head_goes_on(report, trained, tmp_path):
    report("--mode", 0, *SMALL, "--lr", 1e-9, sae=trained / "rm")
    before, after = (
        weights(folder)["score.weight"] for folder in (trained / "rm", tmp_path / "rm")
    )
    torch.testing.assert_close(after, before, rtol=0, atol=1e-7)


def test_held_out_pairs_stop_it_and_logs_stay(report, files, tmp_path):
    flipped = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        for row in tiny_sarm.make_pairs(16)
    ]
    path = tmp_path / "flipped.jsonl"
    tiny_sarm.write_jsonl(path, flipped)
    options = ["--valid", path, "--patience", 2, "--eval-every", 1, "--log", "tensorboard"]
    found, said = report("--mode", 1, *SMALL, "--epochs", 9, "--lr", 3e-3, *options)
    steps = [entry for entry in found["log"] if "loss" in entry]
    assert 2 < len(steps) < 18
    assert f"held out: accuracy {100 * found['held_out']['eval_accuracy']:.1f} %" in said
    (events,) = (tmp_path / "rm" / "logs").rglob("events.out.tfevents.*")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = accumulator.EventAccumulator(str(events))
    log.Reload()
    assert {"train/loss", "eval/accuracy"} <= set(log.Tags()["scalars"])
    assert len(log.Scalars("train/loss")) == len(steps)


def test_bf16_is_autocast_over_fp32_weights(report, files, trained):
    ask = ["--mode", 1, *SMALL, "--valid", files / "valid.jsonl"]
    found, _ = report(*ask, "--bf16", sae=trained / "rm")
    losses = [entry["loss"] for entry in found["log"] if "loss" in entry]
    fp32, _ = report(*ask, sae=trained / "rm")
    wanted = [entry["loss"] for entry in fp32["log"] if "loss" in entry]
    assert losses == pytest.approx(wanted, rel=0.3)  # TopK: see test_bf16_differs_by_...
    assert losses != wanted


def test_lora_changes_the_backbone_by_its_rank(report, trained, tmp_path):
    found, _ = report("--mode", 1, "--lora", 2, *SMALL, "--lr", 1e-2, sae=trained / "rm")
    assert found["mode"] == 1
    name = "model.layers.1.mlp.up_proj.weight"
    before, after = (weights(folder) for folder in (trained / "rm", tmp_path / "rm"))
    assert set(after) == set(before)
    assert 1 <= torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--mode", "7"], "--mode must be head, 0, 1, 2 or 3, got '7'"),
        (["--mode", 1, "--l2", 1], "--l2 belongs to --mode head, got --mode 1"),
        (["--lora", 2], "--lora belongs to modes 0 to 3, got --mode head"),
        (["--mode", 1, "--patience", 1], "patience needs a held-out set"),
        (["--mode", 1, "--kept-tokens", 9], "kept_tokens belongs to checkpointing"),
        (["--mode", 1, "--quantization", "bnb-int8"], "learns by LoRA only: give --lora RANK"),
        (["--mode", 1, "--log", "none", "--batch-size", 6, "--micro-batch", 4], "a multiple of"),
        (["--mode", 1, "--epochs", 0], "epochs must be positive, got 0"),
        (
            ["--smallest-within", 1],
            "of a path (penalty l1 or elastic-net); got 1.0 with penalty l2",
        ),
        (["--penalty", "l0"], "penalty must be one of l2, l1, elastic-net, got 'l0'"),
        (["--penalty", "l1", "--l2", 1], "l2 belongs to penalty l2"),
        (["--valid", "none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_refused(options, says, refused, ask):
    assert says in refused(*ask(*options))


def test_bad_pairs_are_named(refused, sarm, ask, files, tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = tiny_sarm.make_pairs(1)[0]
    for mode in ("head", "1"):
        tiny_sarm.write_jsonl(path, [row, {"prompt": "a", "chosen": "b"}])
        assert f"{path}:2: " in refused(*ask("--mode", mode, preferences=path))
        tiny_sarm.write_jsonl(path, [{**row, "margin": 0.0}] * 2)
        assert "all are ties" in refused(*ask("--mode", mode, preferences=path))
        tiny_sarm.write_jsonl(path, [{**row, "rejected": row["chosen"]}] * 2)
        assert "no pair whose chosen and rejected differ" in refused(
            *ask("--mode", mode, preferences=path)
        )
    tiny_sarm.write_jsonl(path, [row, {**row, "rejected": row["chosen"]}, {"chosen": "b"}])
    done = sarm(*ask("--mode", "1", *SMALL, "--skip-bad", preferences=path))
    assert "1 pairs (1 equal left out" in done.out
    assert "skipped 1 malformed rows" in done.err


def test_another_config_is_refused_while_a_run_is_unfinished(
    refused, sarm, ask, monkeypatch, tmp_path
):
    def killed(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sarm.training.commands.save_pairs", killed)
        assert sarm(*ask("--mode", 1, *SMALL)).code == 130
    line = refused(*ask("--mode", 1, *SMALL, "--lr", 1e-2))
    assert "holds a run with lr=0.001 (now 0.01); choose another folder or delete" in line


# ---- the head ------------------------------------------------------------------------------


def test_the_smallest_head_of_a_path(report, files, trained, tmp_path):
    options = ["--valid", files / "valid.jsonl", "--cache", trained / "states.sqlite"]
    best, _ = report("--penalty", "l1", *options)
    found, said = report("--penalty", "l1", *options, "--smallest-within", 5)
    assert [p["features"] for p in found["path"]] == [p["features"] for p in best["path"]]
    scores = [point["cv_accuracy"] for point in best["path"]]
    wanted = min(
        point["features"] for point in best["path"] if point["cv_accuracy"] >= max(scores) - 0.05
    )
    assert found["head"]["nonzero_weights"] == wanted <= best["head"]["nonzero_weights"]
    assert f"kept: {wanted} features" in said
    assert weights(tmp_path / "rm")["score.weight"].count_nonzero() == wanted
    assert (tmp_path / "rm" / "features.svg").is_file()
