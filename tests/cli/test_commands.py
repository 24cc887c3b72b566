"""Every command on a tiny checkpoint: what it prints and writes."""

import json
import re

import pytest
import tiny_sarm
import torch

from sarm.scorer import SARMScorer


def scores(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_hand(trained, files):
    rows = [json.loads(line) for line in (files / "in.jsonl").read_text().splitlines()]
    scorer = SARMScorer.from_pretrained(trained / "rm")
    return scorer.score([row["messages"] for row in rows]).tolist()


def test_info_names_every_backend_and_why(sarm):
    done = sarm("info")
    assert done.code == 0
    for word in ("sarm", "torch", "reference", "cpu", "triton", "available"):
        assert word in done.out


def test_no_command_prints_the_help(sarm):
    assert "train-sae" in sarm("--help").out
    assert sarm().code == 2


def test_train_sae_reports_and_writes(trained, sarm, backbone_dir, files):
    record = json.loads((trained / "sae" / "sae.json").read_text())
    assert (record["n_latents"], record["k"]) == (64, 6)
    again = sarm("train-sae", backbone_dir, files / "text.jsonl", "-o", trained / "sae",
                 "--n-latents", 64, "--k", 6, "--activations", "turn-end", "--chat",
                 "--batch-size", 32, "--passes", 3)  # fmt: skip
    assert again.code == 0
    assert "FVU" in again.out
    assert "dead" in again.out


def test_train_sae_learns_from_conversations_and_train_rm_reuses_their_states(
    sarm, backbone_dir, files, tmp_path
):
    cache, prefs = tmp_path / "states.sqlite", files / "train.jsonl"
    done = sarm(
        "train-sae", backbone_dir, files / "text.jsonl", "-o", tmp_path / "sae", "--n-latents", 64,
        "--k", 4, "--activations", "turn-end", "--chat", "--conversations", prefs,
        "--cache", cache,
    )  # fmt: skip
    assert done.code == 0, done.err
    texts_alone = sarm(
        "train-sae", backbone_dir, files / "text.jsonl", "-o", tmp_path / "alone", "--n-latents",
        64, "--k", 4, "--activations", "turn-end", "--chat",
    )  # fmt: skip
    conversations = 2 * len(prefs.read_text().splitlines())
    assert states_reported(done) == states_reported(texts_alone) + conversations
    before = cache.read_bytes()
    done = sarm(
        "train-rm", backbone_dir, tmp_path / "sae", prefs, "-o", tmp_path / "sarm",
        "--cache", cache, "--max-length", 1024,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert cache.read_bytes() == before


def states_reported(done):
    return int(re.search(r": (\d+) states from", done.out).group(1))


def test_train_rm_reports_the_head_and_the_probe(sarm, trained, backbone_dir, files, tmp_path):
    done = sarm("train-rm", backbone_dir, trained / "sae", files / "train.jsonl", "-o",
                tmp_path / "rm", "--l2", 0.1, "--limit", 30)  # fmt: skip
    assert done.code == 0
    assert "30 pairs (0 equal left out, 0" in done.out
    assert "SARM head" in done.out
    assert "dense probe" in done.out


def test_score_keeps_order_and_scores_as_the_library_does(sarm, trained, files, tmp_path):
    out = tmp_path / "deep" / "out.jsonl"
    done = sarm("score", files / "in.jsonl", "-m", trained / "rm", "-o", out, "--block", 7)
    assert done.code == 0
    assert done.err == ""
    assert "40 rows (0 from an earlier run), 0 cut" in done.out
    rows = scores(out)
    assert [r["row"] for r in rows] == list(range(40))
    assert [r["id"] for r in rows] == [f"pair-{i // 2}" for i in range(40)]
    expected = by_hand(trained, files)
    assert [r["reward"] for r in rows] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert list(out.parent.iterdir()) == [out]


def test_prompts_longer_than_max_length_are_cut_and_counted(sarm, trained, files, tmp_path):
    out = tmp_path / "out.jsonl"
    done = sarm("score", files / "in.jsonl", "-m", trained / "rm", "-o", out, "--max-length", 30)
    cut = sum(row["dropped_tokens"] > 0 for row in scores(out))
    assert cut > 0
    assert f"{cut} cut to 30 tokens" in done.out


def test_score_reads_prompt_and_completion(sarm, trained, files, tmp_path):
    rows = [json.loads(line) for line in (files / "in.jsonl").read_text().splitlines()[:4]]
    plain = [{"prompt": r["messages"][0]["content"], name: r["messages"][1]["content"]}
             for r, name in zip(rows, ["completion", "response"] * 2, strict=True)]  # fmt: skip
    source = tiny_sarm.write_jsonl(tmp_path / "plain.jsonl", plain)
    assert sarm("score", source, "-m", trained / "rm", "-o", tmp_path / "o.jsonl").code == 0
    rewards = [r["reward"] for r in scores(tmp_path / "o.jsonl")]
    assert rewards == pytest.approx(by_hand(trained, files)[:4], rel=1e-4, abs=1e-5)


# ---- explain -------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [0, 2, 20])
def test_explain_contributions_sum_to_the_reward(sarm, trained, files, top):
    done = sarm("explain", files / "in.jsonl", "-m", trained / "rm", "--row", 3, "--json",
                "--top", top)  # fmt: skip
    explanation = json.loads(done.out)
    reward = explanation["reward"]
    parts = [c["value"] for c in explanation["contributions"]]
    assert len(parts) == min(top, 6)
    assert explanation["n_rest"] == 6 - len(parts)
    assert sum(parts) + explanation["rest"] + explanation["bias"] == pytest.approx(reward, rel=1e-5)
    assert reward == pytest.approx(by_hand(trained, files)[3], rel=1e-4, abs=1e-5)
    for part in explanation["contributions"]:
        assert part["activation"] * part["weight"] == pytest.approx(part["value"])


def test_explain_prints_the_sum(sarm, trained):
    done = sarm("explain", "-m", trained / "rm", "--prompt", "why", "--response", "rain fell")
    reward = done.out.split("reward ")[1].split()[0]
    assert done.out.rstrip().splitlines()[-1].split() == ["sum", reward]


def test_explain_versus_sums_to_the_margin(sarm, trained):
    ask = ["explain", "-m", trained / "rm", "--prompt", "why", "--response", "it fell thanks",
           "--versus", "it fell ugh no", "--top", 3]  # fmt: skip
    comparison = json.loads(sarm(*ask, "--json").out)
    margin = comparison["chosen"]["reward"] - comparison["rejected"]["reward"]
    assert comparison["margin"] == margin
    parts = [d["chosen"] - d["rejected"] for d in comparison["differences"]]
    assert len(parts) == 3
    assert sum(parts) + comparison["rest"] == pytest.approx(margin, rel=1e-4, abs=1e-5)
    assert "margin" in sarm(*ask).out


# ---- steer and eval ------------------------------------------------------------------------


def test_steer_writes_a_model_that_scores_differently(sarm, trained, tmp_path):
    before = SARMScorer.from_pretrained(trained / "rm")
    talk = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "rain fell"}]
    explained = before.explain(talk)
    first, second = explained.contributions[:2]
    done = sarm("steer", "-m", trained / "rm", "-o", tmp_path / "steered",
                "-f", f"{first.feature}=0", "-f", f"{second.feature}=-2.5")  # fmt: skip
    assert done.code == 0
    assert "2 feature weights changed" in done.out
    after = SARMScorer.from_pretrained(tmp_path / "steered").score([talk]).item()
    assert after == pytest.approx(explained.reward - first.value - 3.5 * second.value, abs=1e-4)
    assert torch.equal(
        before.score([talk]), SARMScorer.from_pretrained(trained / "rm").score([talk])
    )


def test_eval_prints_and_writes_intervals(sarm, trained, files, tmp_path):
    ask = ["eval", "-m", trained / "rm", "--preferences", files / "valid.jsonl", "--probe"]
    done = sarm(*ask, "--out", tmp_path / "out", "--cache", trained / "states.sqlite")
    assert done.code == 0
    page = json.loads((tmp_path / "out" / "results.json").read_text())
    assert page["settings"]["max_length"] == 4096
    (benchmark,) = page["benchmarks"]
    scores = benchmark["measures"][0]["scores"]
    assert list(scores) == ["rm", "rm, dense probe"]
    estimate = scores["rm"]["estimate"]
    assert 0.5 < estimate["value"] <= 1
    assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert f"{100 * estimate['value']:.1f}" in done.out
    assert f"{100 * estimate['value']:.1f}" in (tmp_path / "out" / "results.md").read_text()
    assert (tmp_path / "out" / "differences.svg").exists()


def test_eval_compares_models_on_every_benchmark(sarm, trained, files, tmp_path):
    sarm("steer", "-m", trained / "rm", "-o", tmp_path / "steered", "-f", "0=0", "-f", "1=-1")
    answers = {"chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
    pair = {"question": "q", "response_A": "a", "response_B": "b", "label": "A>B"}
    rows = {
        "reward_bench_2": {"prompt": "q", **answers, "chosen": "a", "subset": "Focus"},
        "rm_bench": {"prompt": "q", **answers, "domain": "code"},
        "judge_bench": {**pair, "source": "livecodebench"},
        "rmb": {
            "conversation_input": [{"role": "user", "content": "q"}],
            "chosen": {"answer": "a"},
            "reject": {"answer": "b"},
            "category_path": "Pairwise_set/Harmlessness/S1",
        },
    }
    ask = ["eval", "-m", trained / "rm", "-m", tmp_path / "steered"]
    for name, row in rows.items():
        tiny_sarm.write_jsonl(tmp_path / f"{name}.jsonl", [row])
        ask += [f"--{name.replace('_', '-')}", tmp_path / f"{name}.jsonl"]
    done = sarm(*ask)
    assert done.code == 0, done.err
    for word in ("rm", "steered", "Focus", "code", "coding", "Harmlessness pairwise", "hard"):
        assert word in done.out


def test_train_sae_in_8_bits_with_every_option_and_a_log(sarm, backbone_dir, files, tmp_path):
    pytest.importorskip("tensorboard")
    turns = tmp_path / "turns.jsonl"
    rows = [{"messages": p["prompt"] + p["chosen"]} for p in tiny_sarm.make_pairs(20)]
    turns.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "sae8"
    done = sarm(
        "train-sae", backbone_dir, files / "text.jsonl", "-o", out, "--n-latents", 64, "--k", 4,
        "--quantization", "int8", "--activations", "token:1,sentence:1,turn-end:2", "--chat",
        "--conversations", turns, "--batch-size", 32, "--chunk-states", 200, "--k-start", 8,
        "--multi-topk", "--dead-latents", "resample", "--dead-after", 64, "--pre-bias", "median",
        "--clip", 0, "--ema", 0.9, "--optimizer", "adam-bf16", "--log", "tensorboard",
        "--log-every", 2, "--prefetch", "--cache", tmp_path / "states.sqlite",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "alive at scored tokens" in done.out
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kinds = {name for line in lines for name in line if name.startswith("fvu/")}
    assert kinds == {"fvu/token", "fvu/sentence", "fvu/turn-end", "fvu/scored"}
    assert list((out / "runs").glob("events.*"))
    again = sarm("train-sae", backbone_dir, files / "text.jsonl", "-o", out, "--n-latents", 64,
                 "--k", 4, "--ema", 0.5)  # fmt: skip
    assert again.code == 2
    assert "ema=0.9" in again.err
    assert "ema=0.5" in again.err
