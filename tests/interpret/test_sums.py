"""The sum of contributions is the reward, within the bound of an fp32 sum, on every response."""

import gzip
import itertools
import json
import os
from pathlib import Path

import pytest
import tiny_sarm
import torch

from sarm.explanation import explain_states
from sarm.interpret.attribution import compare, difference
from sarm.scorer import SARMScorer

EPS = 2.0**-24  # half a unit in the last place of fp32, relative


def check(scorer, conversations):
    """Every explanation of the batch; the bound is that of `explain_states`."""
    encoded = scorer.encode(conversations)
    states = torch.empty(len(encoded), scorer.model.sae.d_model)
    for indices, some in scorer._states([e.ids for e in encoded]):
        states[indices] = some
    rewards = scorer.score_token_ids([e.ids for e in encoded])
    found = explain_states(scorer.model, states, encoded, 10**6)
    assert len(found) == len(conversations)
    dense = scorer.model.config.sarm["activation"] == "none"
    for explanation, reward in zip(found, rewards.tolist(), strict=True):
        values = [c.value for c in explanation.contributions]
        assert all(c.value == c.activation * c.weight for c in explanation.contributions)
        assert explanation.n_rest == 0
        size = sum(map(abs, values))
        # a folded head multiplies in another order: its d_model products and the encoder's
        terms = len(values) + (4 * scorer.model.sae.d_model if dense else 0)
        bound = (terms + 1) * EPS * (size + abs(reward))
        assert abs(sum(values) - explanation.reward) <= bound
        assert explanation.reward == pytest.approx(reward, rel=1e-5, abs=1e-5)
    return found


def conversations(count=40):
    return [
        [*row["prompt"], *row[side]]
        for row in tiny_sarm.make_pairs(count // 2)
        for side in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("activation", ["topk", "topk_relu", "jumprelu", "none"])
def test_random_models(explained, activation, quantization):
    check(explained(activation, quantization), conversations())


def test_shortened_lists_keep_the_sum(explained):
    scorer = explained()
    for top in (0, 1, 3, 6, 100):
        found = scorer.explain(conversations()[0], top)
        assert len(found.contributions) == min(top, 6)
        total = found.rest + sum(c.value for c in found.contributions)
        assert total == pytest.approx(found.reward, abs=1e-6)


def test_a_margin_is_the_sum_of_differences(explained):
    scorer = explained()
    chosen, rejected = conversations()[:2]
    whole = compare(scorer, chosen, rejected, 10**6)
    margin = sum(d.value for d in whole.differences)
    assert margin == pytest.approx(whole.margin, abs=2e-6)
    labelled = compare(scorer, chosen, rejected, 2, {whole.differences[0].feature: "polite"})
    assert [d.label for d in labelled.differences] == ["polite", None]
    assert labelled.rest == pytest.approx(sum(d.value for d in whole.differences[2:]))
    same = difference(whole.chosen, whole.chosen, 5)
    assert same.margin == 0
    assert all(d.value == 0 for d in same.differences)


@pytest.mark.slow
def test_a_real_model_on_real_responses():
    """SARM_TEST_SARM: a checkpoint; SARM_DATA: a folder with preferences_valid.jsonl.gz."""
    model, data = os.environ.get("SARM_TEST_SARM"), os.environ.get("SARM_DATA")
    if not model or not data:
        pytest.skip("set SARM_TEST_SARM and SARM_DATA")
    scorer = SARMScorer.from_pretrained(model, quantization="int8", max_length=512, decoder=False)
    with gzip.open(Path(data) / "preferences_valid.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 40)]
    check(scorer, [[*row["prompt"], *row[s]] for row in rows for s in ("chosen", "rejected")])
