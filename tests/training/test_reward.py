"""train-rm end to end on a tiny backbone with a planted signal."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_sarm
import torch

from sarm.backbone import load_backbone
from sarm.data import BadRecords, Record, to_pair
from sarm.errors import InputError
from sarm.sae import TopKSAE
from sarm.scorer import SARMScorer
from sarm.states import StateCache
from sarm.tokens import ConversationEncoder
from sarm.training.reward import (
    dense_differences,
    feature_differences,
    load_probe,
    pair_states,
    save_reward,
    sparse_features,
    train_reward,
    usable_pairs,
)

ROWS = tiny_sarm.make_pairs(60)
MORE = tiny_sarm.make_pairs(120, seed=1)


def pairs_of(rows):
    return [to_pair(Record(f"pairs.jsonl:{i + 1}", row)) for i, row in enumerate(rows)]


def conversations(pairs):
    return [side for pair in pairs for side in (pair.chosen, pair.rejected)]


@pytest.fixture
def sae():
    torch.manual_seed(0)
    return TopKSAE(32, 128, 8)


@pytest.fixture
def fit_of(backbone, tokenizer, sae, tmp_path):
    def fit(
        rows=ROWS, backbone=backbone, max_length=512, cache="states.sqlite", sae=sae, **options
    ):
        encoder = ConversationEncoder(tokenizer, max_length)
        with StateCache(tmp_path / cache, backbone) as states:
            return train_reward(backbone, sae, pairs_of(rows), encoder, states, **options)

    return fit


def test_a_planted_signal_is_learnt(fit_of):
    fit = fit_of(ROWS[:40])
    assert fit.pairs == 40
    assert fit.equal == fit.truncated == 0
    assert fit.head.accuracy > 0.9
    assert fit.probe.accuracy > 0.9
    assert fit.head.gradient_norm < 1e-6


def test_the_head_holds_on_prompts_it_never_saw(fit_of, tokenizer):
    model = fit_of(MORE).model
    rewards = SARMScorer(model, tokenizer).score(conversations(pairs_of(ROWS)))
    assert (rewards[0::2] > rewards[1::2]).float().mean() > 0.8


def test_a_reversed_preference_is_learnt_reversed(fit_of):
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in ROWS]
    a, b = fit_of(l2=0.1), fit_of(swapped, l2=0.1)
    assert np.abs(a.head.weight + b.head.weight).max() < 1e-5 * np.abs(a.head.weight).max()


def test_features_are_the_saes_latents(sae):
    states = torch.randn(50, 32)
    latents = sae.encode(states)
    dense = torch.zeros(50, 128).scatter(1, latents.idx.long(), latents.vals).detach().numpy()
    assert np.allclose(sparse_features(sae, states, batch=7).toarray(), dense, atol=1e-6)


def test_margins_of_the_model_are_feature_differences_times_the_head(
    fit_of, backbone, tokenizer, sae
):
    fit = fit_of()
    with StateCache(":memory:", backbone) as cache:
        states, equal = pair_states(pairs_of(ROWS), ConversationEncoder(tokenizer, 512), cache)
    assert equal == 0
    margins = feature_differences(sae, states) @ fit.head.weight
    rewards = SARMScorer(fit.model, tokenizer).score(conversations(pairs_of(ROWS))).double()
    assert (
        np.abs((rewards[0::2] - rewards[1::2]).numpy() - margins).max() < 1e-5 * rewards.abs().max()
    )
    probe = dense_differences(sae, states) @ fit.probe.weight
    assert fit.probe.accuracy == np.mean(probe > 0)


def test_equal_pairs_are_counted_and_left_out(fit_of):
    equal = [{**row, "rejected": row["chosen"]} for row in ROWS[:3]]
    fit = fit_of(equal + ROWS[3:40], l2=0.1)
    assert (fit.pairs, fit.equal) == (37, 3)
    same = fit_of(ROWS[3:40], l2=0.1)
    assert np.array_equal(fit.head.weight, same.head.weight)


def test_only_equal_pairs_are_refused(fit_of):
    with pytest.raises(InputError, match="no pair whose chosen and rejected differ"):
        fit_of([{**row, "rejected": row["chosen"]} for row in ROWS[:3]])


def test_truncation_is_counted(fit_of, tokenizer):
    lengths = [len(e.ids) for e in ConversationEncoder(tokenizer, 10**6).encode(
        conversations(pairs_of(ROWS)))]  # fmt: skip
    limit = sorted(lengths)[len(lengths) // 2]
    fit = fit_of(max_length=limit)
    assert fit.truncated == sum(n > limit for n in lengths) > 0


def test_pairs_of_one_prompt_share_a_group(backbone, tokenizer):
    row = ROWS[0]
    other = {**row, "chosen": [{"role": "assistant", "content": "something else"}]}
    with StateCache(":memory:", backbone) as cache:
        encoder = ConversationEncoder(tokenizer, 512)
        states, _ = pair_states(pairs_of([row, other, ROWS[1]]), encoder, cache)
    assert states.groups[0] == states.groups[1] != states.groups[2]


def test_the_backbone_runs_once(fit_of):
    ran = []
    fit_of(progress=lambda done, of: ran.append(of))
    assert ran[-1] > 0
    ran.clear()
    fit_of(progress=lambda done, of: ran.append(of))
    assert set(ran) == {0}


def test_an_sae_of_another_width_is_refused(fit_of):
    with pytest.raises(InputError, match="d_model=16, the backbone 32"):
        fit_of(sae=TopKSAE(16, 32, 4))


def test_a_pair_that_cannot_be_rendered_is_named(fit_of):
    bad = {**ROWS[0], "chosen": [{"role": "alien", "content": "x"}, *ROWS[0]["chosen"]]}
    with pytest.raises(InputError, match=r"pairs.jsonl:2 \(chosen\).*unknown role alien"):
        fit_of([ROWS[1], bad])


def test_pairs_that_cannot_be_rendered_are_skipped_and_counted_when_asked(tokenizer):
    bad_role = {**ROWS[0], "rejected": [{"role": "alien", "content": "x"}, *ROWS[0]["chosen"]]}
    no_answer = {**ROWS[0], "chosen": ROWS[0]["prompt"]}
    pairs = pairs_of([ROWS[1], bad_role, ROWS[2], no_answer])
    bad = BadRecords(skip=True)
    kept = usable_pairs(pairs, ConversationEncoder(tokenizer, 512), bad)
    assert [p.where for p in kept] == ["pairs.jsonl:1", "pairs.jsonl:3"]
    assert bad.count == 2
    assert "pairs.jsonl:2" in bad.first
    with pytest.raises(InputError, match=r"pairs\.jsonl:2"):
        usable_pairs(pairs, ConversationEncoder(tokenizer, 512), BadRecords())


# ---- saving --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_saved_sarm_gives_the_rewards_it_was_fitted_with(
    fit_of, backbone_dir, tokenizer, tmp_path, dtype
):
    fit = fit_of(backbone=load_backbone(backbone_dir, dtype=dtype), cache=f"{dtype}.sqlite")
    talks = conversations(pairs_of(ROWS))
    before = SARMScorer(fit.model, tokenizer).score(talks)
    save_reward(fit, tokenizer, tmp_path / "rm", {"preferences": "here"})
    scorer = SARMScorer.from_pretrained(tmp_path / "rm", dtype=dtype)
    assert torch.equal(scorer.score(talks), before)
    assert scorer.encode(talks[:1]) == SARMScorer(fit.model, tokenizer).encode(talks[:1])
    accuracy = (before[0::2] > before[1::2]).double().mean().item()
    assert accuracy == pytest.approx(fit.head.accuracy)


def test_the_callers_sae_is_left_as_it_was(fit_of, backbone_dir, sae):
    fit_of(backbone=load_backbone(backbone_dir, dtype=torch.bfloat16))
    assert sae.encoder.weight.dtype == torch.float32


def test_the_probe_and_the_report_are_saved(fit_of, tokenizer, tmp_path):
    fit = fit_of()
    save_reward(fit, tokenizer, tmp_path / "rm", {"preferences": "here"})
    assert torch.equal(load_probe(tmp_path / "rm"), torch.from_numpy(fit.probe.weight).float())
    report = json.loads((tmp_path / "rm" / "training.json").read_text())
    assert report["pairs"] == 60
    assert report["preferences"] == "here"
    assert report["head"]["l2"] == fit.head.l2
    assert report["head"]["nonzero_weights"] == np.count_nonzero(fit.head.weight)


def test_a_missing_probe_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no dense probe; train-rm writes one"):
        load_probe(tmp_path)


@pytest.mark.parametrize("fails", ["model", "probe"])
def test_a_full_disk_while_saving_leaves_the_earlier_model(
    fit_of, tokenizer, tmp_path, monkeypatch, fails
):
    """Nothing lost, nothing half-written: every file is the earlier run's."""
    fit = fit_of(ROWS[:40])
    save_reward(fit, tokenizer, tmp_path / "rm")
    before = {p.name: p.read_bytes() for p in (tmp_path / "rm").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    target = "transformers.modeling_utils.safe_save_file"
    monkeypatch.setattr(target if fails == "model" else "sarm.training.reward.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_reward(replace(fit, pairs=7), tokenizer, tmp_path / "rm")
    assert {p.name: p.read_bytes() for p in (tmp_path / "rm").iterdir()} == before
