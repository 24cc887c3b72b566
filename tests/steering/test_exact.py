"""A steered reward is the sum that the profile says, bit for bit the same by every way there is."""

import math

import pytest
import torch

import sarm
from sarm import InputError
from sarm.steering import Change, Gate, Heads, SteeringProfile, steered

GATE = Gate({j: 0.3 + j / 96 for j in range(0, 96, 2)}, 2.0, 0.7)
EVERY = range(96)
PROFILES = {
    "nothing": SteeringProfile({3: Change()}),
    "multiply": SteeringProfile({j: Change(multiply=0.5 + j / 50) for j in EVERY}),
    "add": SteeringProfile({j: Change(add=(j - 40) / 50) for j in EVERY}),
    "ablate": SteeringProfile({j: Change(multiply=0.0) for j in range(0, 96, 3)}),
    "clamp": SteeringProfile({j: Change(low=0.4, high=0.9) for j in EVERY}),
    "clamp below": SteeringProfile({j: Change(low=5.0) for j in range(0, 96, 2)}),
    "all": SteeringProfile({j: Change(2.0, -0.1, 0.1, 1.0) for j in range(0, 96, 2)}),
    "gate": SteeringProfile({}, GATE),
    "gate and all": SteeringProfile({j: Change(0.5, 0.2, 0.0, 0.9) for j in EVERY}, GATE),
    "gate and nothing": SteeringProfile({j: Change(add=0.5, high=0.0) for j in EVERY}, GATE),
}


@pytest.fixture
def conversations(chat):
    answers = ("hello", "no", "choose reset " * 9, "please", "I do not know", "open settings")
    return [chat("how do I reset?", a) for a in answers]


def by_hand(weight, vals, idx, profile):
    """The docstring's formula in Python floats."""
    rewards = []
    for row_vals, row_idx in zip(vals.tolist(), idx.tolist(), strict=True):
        latents = [(j, z) for j, z in zip(row_idx, row_vals, strict=True) if z != 0]
        plain = sum(weight[j] * z for j, z in latents)
        inside = 0.0
        for j, z in latents:
            c = profile.changes.get(j, Change())
            inside += (c.multiply * weight[j] + c.add) * min(max(z, c.low), c.high)
        if profile.when is not None:
            g = sum(profile.when.weights.get(j, 0.0) * z for j, z in latents)
            beyond = g - profile.when.above
            assert abs(beyond) > 1e-4  # or fp32 might see it on the other side
            inside = inside + profile.when.slope * beyond if beyond > 0 else plain
        rewards.append(inside)
    return rewards


@pytest.mark.parametrize("name", PROFILES)
def test_the_formula(name, make_scorer, conversations):
    scorer, profile = make_scorer(prefix_cache_mib=0), PROFILES[name]
    latents = scorer.latents(conversations)
    weight = scorer.model.score.weight[0].tolist()
    expected = by_hand(weight, latents.vals, latents.idx, profile)
    got = scorer.score(conversations, profiles=[profile])[:, 0]
    assert got.tolist() == pytest.approx(expected, rel=2e-5, abs=2e-5)
    if name != "nothing":
        assert (got - scorer.score(conversations)).abs().max() > 0.01


def test_the_gate_opens_for_some(make_scorer, conversations):
    scorer = make_scorer()
    moved = scorer.score(conversations, profiles=[{}, PROFILES["gate"]])
    share = (moved[:, 0] != moved[:, 1]).double().mean().item()
    assert 0 < share < 1  # else the tests of this file would not see a gate


def test_all_ways_give_the_same_bits(make_scorer, conversations, tmp_path, forward_tokens):
    """One pass for many profiles, a steered scorer, and the checkpoint it saves."""
    scorer = make_scorer(prefix_cache_mib=0)
    together = scorer.score(conversations, profiles=list(PROFILES.values()))
    heads = Heads.of(scorer.model, list(PROFILES.values()))
    latents = scorer.latents(conversations)
    assert torch.equal(heads.from_latents(*latents), together)
    for p, (name, profile) in enumerate(PROFILES.items()):
        alone = scorer.steer(profile)
        assert torch.equal(alone.score(conversations), together[:, p]), name
        alone.save_pretrained(tmp_path / name)
        back = sarm.SARMScorer.from_pretrained(tmp_path / name, prefix_cache_mib=0)
        assert torch.equal(back.score(conversations), together[:, p]), name
        assert (back.model.config.sarm["steering"] is None) == profile.linear


@pytest.mark.parametrize("name", PROFILES)
def test_explanations_still_sum_to_the_reward(name, make_scorer, conversations):
    scorer = make_scorer(prefix_cache_mib=0).steer(PROFILES[name])
    rewards = scorer.score(conversations).tolist()
    for conversation, reward in zip(conversations, rewards, strict=True):
        told = scorer.explain(conversation, top=3)
        total = told.bias + sum(c.value for c in told.contributions) + told.rest
        assert told.reward == pytest.approx(reward, rel=1e-5, abs=1e-6)
        assert total == pytest.approx(reward, rel=1e-5, abs=1e-5)


def test_an_inactive_feature_stays_out_whatever_its_clamp(make_scorer, conversations):
    scorer = make_scorer(prefix_cache_mib=0)
    used = set(scorer.latents(conversations).idx.flatten().tolist())
    silent = next(j for j in EVERY if j not in used)
    profile = SteeringProfile({silent: Change(add=5.0, low=3.0)})
    assert torch.equal(scorer.steer(profile).score(conversations), scorer.score(conversations))


def test_zeros_that_fill_a_row_up_are_not_clamped(make_scorer):
    """A TopK row with fewer than k positive activations ends in zeros, which are no activations."""
    heads = Heads.of(make_scorer().model, [SteeringProfile({j: Change(low=5.0) for j in EVERY})])
    vals, idx = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[4, 7, 9]])
    expected = 5.0 * heads.weight[0, 4].item()
    assert heads.from_latents(vals, idx).item() == pytest.approx(expected, rel=1e-6)


def test_the_reward_is_continuous_where_the_gate_opens(make_scorer):
    model = make_scorer().model
    heads = Heads.of(model, [{}, SteeringProfile({}, Gate({4: 2.0}, 3.0, 0.7))])
    z = torch.tensor([1.5 - 1e-4, 1.5 + 1e-4, 2.5])[:, None]
    plain, gated = heads.from_latents(z, torch.full((3, 1), 4)).T
    added = (gated - plain).tolist()
    assert added[0] == 0.0
    assert added == pytest.approx([0.0, 1.4e-4, 1.4], abs=1e-5)


def test_linear_profiles_compose_with_a_program(make_scorer, conversations):
    scorer = make_scorer(prefix_cache_mib=0)
    for name in ("clamp", "gate and all"):
        program = scorer.steer(PROFILES[name])
        twice = program.steer({3: 2.0, 8: 0.0})
        changed = twice.model.score.weight != scorer.model.score.weight
        assert changed.nonzero()[:, 1].tolist() == [3, 8]
        assert twice.model.config.sarm["steering"] == program.model.config.sarm["steering"]
        listed = program.score(conversations, profiles=[{3: 2.0, 8: 0.0}])[:, 0]
        assert torch.equal(twice.score(conversations), listed)
        with pytest.raises(InputError, match="already carries clamps or a gate"):
            program.steer(PROFILES["clamp"])
        with pytest.raises(InputError, match=r"profiles\[1\]: the model already carries"):
            program.score(conversations, profiles=[{}, PROFILES["gate"]])


def test_a_model_without_topk_takes_linear_profiles_alone(make_scorer, conversations):
    scorer = make_scorer(activation="none", prefix_cache_mib=0)
    profile = PROFILES["add"]
    both = scorer.score(conversations, profiles=[{}, profile])
    assert torch.equal(scorer.steer(profile).score(conversations), both[:, 1])
    with pytest.raises(InputError, match="steer: clamp and when need active latents"):
        scorer.steer(PROFILES["clamp"])
    with pytest.raises(InputError, match=r"profiles\[0\]: clamp and when need active latents"):
        scorer.score(conversations, profiles=[PROFILES["gate"]])


def test_a_program_is_no_head_weight(make_scorer):
    with pytest.raises(InputError, match="is no head weight"):
        steered(make_scorer().model.score.weight, PROFILES["clamp"])


def test_a_config_whose_steering_is_damaged_is_refused(make_scorer, tmp_path):
    make_scorer().steer(PROFILES["gate"]).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    for old, new, says in (
        ('"above": 2.0', '"above": "x"', "sarm.steering: when.above: must be a finite number"),
        ('"0": 0.3', '"960": 0.3', r"sarm.steering: feature must be in \[0, 96\), got 960"),
    ):
        text = config.read_text("utf-8")
        assert old in text
        config.write_text(text.replace(old, new), "utf-8")
        with pytest.raises(InputError, match=says):
            sarm.SARMScorer.from_pretrained(tmp_path)
        config.write_text(text, "utf-8")


def test_bounds_may_be_open(make_scorer, conversations):
    scorer = make_scorer(prefix_cache_mib=0)
    wide = SteeringProfile({j: Change(low=-math.inf, high=1e9) for j in EVERY})
    assert torch.equal(scorer.steer(wide).score(conversations), scorer.score(conversations))
