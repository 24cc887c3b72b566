"""Running benchmarks equals scoring by hand; states come from the cache where it has them."""

import json

import numpy as np
import pytest
import tiny_sarm
import torch

from sarm.errors import InputError
from sarm.evaluation import benchmarks
from sarm.evaluation.run import run_benchmarks
from sarm.scorer import SARMScorer
from sarm.training.reward import load_probe


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    draw = np.random.default_rng(0)

    def answers(n):
        return [" ".join(draw.choice(tiny_sarm.WORDS, 6)) for _ in range(n)]

    rb2 = [{"prompt": f"q{i}", "chosen": answers(1), "rejected": answers(3)} for i in range(12)]
    rmb = [{"prompt": f"p{i}", "chosen": answers(3), "rejected": answers(3)} for i in range(9)]
    (folder / "chat.json").write_text(json.dumps(rmb))
    return [
        benchmarks.preferences(
            tiny_sarm.write_jsonl(folder / "valid.jsonl", tiny_sarm.make_pairs(20, seed=5))
        ),
        benchmarks.reward_bench_2(tiny_sarm.write_jsonl(folder / "rb2.jsonl", rb2)),
        benchmarks.rm_bench(folder / "chat.json"),
    ]


@pytest.fixture(scope="module")
def results(sarm_dir, suite):
    return run_benchmarks(sarm_dir, suite, max_length=512, probe=True)


def by_hand(rewards, suite):
    """Accuracies of all three benchmarks from one list of rewards, written without the package."""
    rewards = list(rewards)
    values, take = [], 0
    pairs = [rewards[2 * i : 2 * i + 2] for i in range(20)]
    values.append(np.mean([a > b for a, b in pairs]))
    take = 40
    fours = [rewards[take + 4 * i : take + 4 * i + 4] for i in range(12)]
    values.append(np.mean([f[0] == max(f) for f in fours]))
    take += 48
    sixes = [rewards[take + 6 * i : take + 6 * i + 6] for i in range(9)]
    values.append(np.mean([[c > r for c in s[:3] for r in s[3:]] for s in sixes]))
    assert take + 54 == len(rewards)
    return values


def test_results_equal_scoring_by_hand(sarm_dir, suite, results):
    scorer = SARMScorer.from_pretrained(sarm_dir, max_length=512)
    rewards = scorer.score([c for b in suite for item in b.items for c in item.conversations])
    expected = by_hand(rewards.tolist(), suite)
    got = [r.estimates["accuracy"].value for r in results["SARM"]]
    # RM-Bench: easy, normal and hard weigh the same, so the mean over the matrix differs
    assert got[:2] == pytest.approx(expected[:2])
    wins = results["SARM"][2].estimates
    matrix = (3 * wins["easy"].value + 3 * wins["normal"].value + 3 * wins["hard"].value) / 9
    assert matrix == pytest.approx(expected[2])
    assert [r.items for r in results["SARM"]] == [20, 12, 9]
    assert got[0] > 0.7  # the planted signal


def test_the_dense_probe_is_judged_on_the_same_states(sarm_dir, suite, results):
    scorer = SARMScorer.from_pretrained(sarm_dir, max_length=512)
    talks = [c for b in suite for item in b.items for c in item.conversations]
    weight = load_probe(sarm_dir)
    rewards = []
    for encoded in scorer.encode(talks):
        with torch.inference_mode():
            hidden = scorer.model.model(torch.tensor([encoded.ids])).last_hidden_state[0, -1]
        rewards.append(float((hidden - hidden.mean()) / (hidden.std() + 1e-6) @ weight))
    expected = by_hand(rewards, suite)
    got = [r.estimates["accuracy"].value for r in results["dense probe"]]
    assert got[:2] == pytest.approx(expected[:2])


def test_without_a_probe_only_the_sarm_is_judged(sarm_dir, suite):
    assert list(run_benchmarks(sarm_dir, suite[:1], max_length=512)) == ["SARM"]


def test_truncated_conversations_are_counted(sarm_dir, suite, results):
    assert [r.truncated for r in results["SARM"]] == [0, 0, 0]
    cut = run_benchmarks(sarm_dir, suite, max_length=30)["SARM"]
    tokenizer = SARMScorer.from_pretrained(sarm_dir, max_length=10**6)
    for benchmark, result in zip(suite, cut, strict=True):
        talks = [c for item in benchmark.items for c in item.conversations]
        assert result.truncated == sum(len(e.ids) > 30 for e in tokenizer.encode(talks)) > 0


def test_the_backbones_positions_bound_the_length(sarm_dir, suite, monkeypatch):
    seen = []
    from sarm.evaluation import run

    real = run.ConversationEncoder
    monkeypatch.setattr(run, "ConversationEncoder", lambda t, n: seen.append(n) or real(t, n))
    run_benchmarks(sarm_dir, suite[:1], max_length=10**6)
    assert seen == [2048]


def test_the_cache_is_used_and_shared_with_training(sarm_dir, suite, tmp_path):
    def new_tokens(cache, suite):
        seen = []
        run_benchmarks(sarm_dir, suite, max_length=512, cache=cache,
                       progress=lambda done, of: seen.append(of))  # fmt: skip
        return seen[-1]

    cache = tmp_path / "eval.sqlite"
    assert new_tokens(cache, suite) > 0
    assert new_tokens(cache, suite) == 0
    trained = benchmarks.preferences(
        tiny_sarm.write_jsonl(tmp_path / "train.jsonl", tiny_sarm.make_pairs(30))
    )
    assert new_tokens(sarm_dir.parent / "cache.sqlite", [trained]) == 0


def test_results_do_not_depend_on_the_cache(sarm_dir, suite, results, tmp_path):
    again = run_benchmarks(sarm_dir, suite, max_length=512, probe=True, cache=tmp_path / "c.sqlite")
    assert again == results


def test_a_conversation_the_template_refuses_is_named(sarm_dir, tmp_path):
    row = tiny_sarm.make_pairs(1)[0]
    row["prompt"] = [{"role": "alien", "content": "x"}]
    path = tiny_sarm.write_jsonl(tmp_path / "bad.jsonl", [row])
    with pytest.raises(InputError, match=r"bad.*bad\.jsonl:1.*alien"):
        run_benchmarks(sarm_dir, [benchmarks.preferences(path)], max_length=512)
