"""Finding: the published score by hand, planted features, bounds that hold on other prompts."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from latent_sets import latent_set, sparse_rows

from sarm import InputError
from sarm.evaluation.sources import part_of
from sarm.evaluation.steering import evaluate_steering
from sarm.evaluation.steering_report import write_steering_report
from sarm.steering import Change, Gate, Heads, SteeringProfile
from sarm.steering.find import domain_profile, merged, write_contrast
from sarm.steering.finding import contrast, contrast_score
from sarm.steering.gate import fit_gate
from sarm.steering.solve import bounded_head, changed_pairs

F = 40


def domain(seed, prompts=120, common=0.0):
    """Pairs of a domain: features 0-3 mark it, 0 and 1 more so in chosen answers."""
    draw = np.random.default_rng(seed)
    rows = sparse_rows(draw, 2 * prompts, F)
    rows[:, :4] = 0
    for j, chosen, rejected in ((0, 0.9, 0.2), (1, 0.8, 0.3), (2, 0.7, 0.7), (3, 0.6, 0.6)):
        share = np.tile([chosen, rejected], prompts)
        rows[:, j] = draw.gamma(4.0, 0.25, 2 * prompts) * (draw.random(2 * prompts) < share)
    return latent_set(rows, name=f"domain {seed}")


def elsewhere(seed, prompts=400):
    """Pairs from outside: the domain's features are there too, but seldom together."""
    draw = np.random.default_rng(seed)
    rows = sparse_rows(draw, 2 * prompts, F)
    rows[:, :4] = sparse_rows(draw, 2 * prompts, 4, 0.05)
    return latent_set(rows, name=f"elsewhere {seed}")


@pytest.fixture
def model(make_sarm):
    """Its head is what counts; latents are made up."""
    made = make_sarm(n_latents=F)
    made.score.weight.data = torch.randn(1, F, generator=torch.Generator().manual_seed(3))
    return made


def test_the_published_score_by_hand():
    chosen, rejected = np.array([6.0, 1.0, 0.0]), np.array([2.0, 3.0, 0.0])
    # totals 8, 4, 0: their mean is 4
    assert contrast_score(chosen, rejected).tolist() == pytest.approx([4 / 12, -2 / 8, 0.0])
    assert contrast_score(np.zeros(2), np.zeros(2)).tolist() == [0.0, 0.0]
    z = sp.csr_matrix([[4.0, 0, 0], [2, 3, 0], [2, 1, 0], [0, 0, 0]])
    found = contrast(z, np.array([1, 0, 1, 0], bool), np.array([0, 0, 1, 1]), top=1, resamples=50)
    assert found.score.tolist() == pytest.approx([4 / 12, -2 / 8, 0.0])
    assert found.rank.tolist() == [1, 3, 2]


def test_a_prompt_without_activations_is_resampled_too():
    z = sp.csr_matrix([[3.0, 0], [0, 1], [0, 0], [0, 0]])
    found = contrast(z, np.array([1, 0, 1, 0], bool), np.array([0, 0, 1, 1]), top=1, resamples=50)
    assert np.isfinite(found.low).all()
    assert found.low[0] == 0.0 < found.high[0]


def test_planted_features_are_stable_and_noise_is_not():
    one = domain(0)
    found = contrast(one.matrix, one.chosen, one.groups, top=5, resamples=200)
    assert found.stable(0.95).tolist() == [0, 1]
    assert found.selected[[0, 1]].tolist() == [1.0, 1.0]
    assert (found.low <= found.score).all()
    assert (found.score <= found.high).all()
    assert found.rank_high[0] <= 3 < found.rank_high[2:].max()
    assert 0.3 < found.agreement < 1
    again = contrast(one.matrix, one.chosen, one.groups, top=5, resamples=200)
    assert np.array_equal(found.selected, again.selected)


def test_prompts_are_resampled_whole():
    """One prompt holds all of a feature's evidence: pairs would look stable, prompts do not."""
    draw = np.random.default_rng(0)
    rows = sparse_rows(draw, 80, 10)
    rows[:, 0] = 0
    rows[0:20:2, 0] = 5.0  # ten pairs of one prompt
    together = latent_set(rows, per_prompt=10)
    apart = latent_set(rows, per_prompt=1)
    selected = [
        contrast(s.matrix, s.chosen, s.groups, top=1, resamples=400).selected[0]
        for s in (together, apart)
    ]
    assert selected[0] < 0.85  # 1 - (3/4)^4 = 0.68 of the resamples hold the prompt at all
    assert selected[1] > 0.99


@pytest.mark.parametrize(
    ("chosen", "groups", "says"),
    [([1, 1], [0, 1], "needs chosen and rejected"), ([1, 0], [0, 0], "at least 2 prompts, got 1")],
)
def test_contrast_refusals(chosen, groups, says):
    with pytest.raises(InputError, match=says):
        contrast(sp.csr_matrix(np.eye(2)), np.array(chosen, bool), np.array(groups), top=1)
    for silent in (sp.csr_matrix((2, 2)), latent_set(np.zeros((2, 2))).matrix):
        with pytest.raises(InputError, match="no feature is active"):
            contrast(silent, np.array([True, False]), np.array([0, 1]), top=1)


def test_the_bounded_head_keeps_its_constraints():
    target, off = domain(0), [elsewhere(1), elsewhere(2, 150)]
    added = bounded_head(target, off, 1.5)
    assert (target.matrix[target.chosen] @ added).mean() == pytest.approx(1.5, rel=1e-6)
    for one in off:
        assert (one.matrix @ added).mean() == pytest.approx(0.0, abs=1e-6)
    few = bounded_head(target, off, 1.5, features=np.array([0, 1, 2, 3, 9, 10]))
    assert set(np.flatnonzero(few)) == {0, 1, 2, 3, 9, 10}
    assert (target.matrix[target.chosen] @ few).mean() == pytest.approx(1.5, rel=1e-6)
    with pytest.raises(InputError, match="moves the target and not the off-target"):
        bounded_head(target, [target], 1.5, features=np.array([0]))


def test_the_gate_moves_the_domain_and_little_else(model):
    target, off, fresh, other = domain(0), elsewhere(1), domain(10), elsewhere(11)
    found = domain_profile(model, target, [off], method="gate", shift=0.8, name="d")
    assert found.warning is None
    heads = Heads.of(model, [{}, found.profile, {0: 3.0, 1: 3.0}])
    result = evaluate_steering(heads, ["gate", "multiply"], [fresh], [other])
    gate, plain, gate_off, plain_off = result.shifts
    assert gate.chosen.value > 0.5
    assert gate.chosen.low > 0.3
    assert abs(gate_off.all.value) < 0.05
    assert gate_off.changes.value <= 0.02
    assert plain_off.changes.value > gate_off.changes.value
    assert gate.moved > 0.3 > 0.05 > gate_off.moved


def gated(gate, one):
    """(N,) what a gate adds."""
    weight = np.zeros(one.n_latents)
    weight[list(gate.weights)] = list(gate.weights.values())
    return gate.slope * np.maximum(0, one.matrix @ weight - gate.above)


def rewards_of(one, seed=0):
    return np.random.default_rng(seed).normal(size=one.matrix.shape[0])


def test_a_gate_keeps_its_bounds_at_the_lowest_threshold():
    target, off = domain(0), elsewhere(1)
    rewards = [rewards_of(off)]
    fit = fit_gate(target, [off], rewards, 3.0)
    (seen,) = fit.off
    assert fit.within
    assert seen.changes <= seen.touched <= 0.01 - seen.error
    assert abs(seen.mean) <= 0.05
    assert not fit.gate.weights.keys() - range(F)
    assert fit.opens == fit.tuned
    bolder = fit_gate(target, [off], rewards, 3.0, margin=0.0)
    wider = fit_gate(target, [off], rewards, 3.0, max_touched=0.05)
    assert fit.opens <= bolder.opens < wider.opens
    assert wider.off[0].touched > 0.01
    sure = fit_gate(target, [off], rewards, 3.0, max_touched=0.05, margin=3.0)
    assert sure.opens < wider.opens
    assert sure.off[0].touched + 3 * sure.off[0].error <= 0.05
    timid = fit_gate(target, [off], rewards, 3.0, max_mean=seen.mean / 2)
    assert timid.opens < fit.opens  # the mean is a bound of its own


def test_a_gate_is_judged_out_of_fold_by_prompts():
    """Four equal pairs a prompt and 400 features of noise: in sample nothing would be touched."""

    def noise(seed, prompts, mark):
        draw = np.random.default_rng(seed)
        rows = sparse_rows(draw, 2 * prompts, 400)
        rows[:, 0] = mark * (draw.random(2 * prompts) < 0.5)
        rows = rows.reshape(prompts, 1, 2, 400).repeat(4, axis=1).reshape(-1, 400)
        return latent_set(rows, per_prompt=4, name=f"noise {seed}")

    target, off, other = noise(0, 40, 1.0), noise(1, 60, 0.0), noise(2, 400, 0.0)
    fit = fit_gate(target, [off], [rewards_of(off)], 1.0, max_touched=0.3, max_mean=9.0, l2=1e-3)
    fresh = (gated(fit.gate, other)[other.pairs[:, :2]] > 0).any(1).mean()
    assert fit.off[0].touched == pytest.approx(fresh, abs=0.1)
    assert fit.off[0].touched > 0.15
    new = noise(3, 400, 1.0)
    assert fit.opens == pytest.approx((gated(fit.gate, new)[new.chosen] > 0).mean(), abs=0.15)
    few = fit_gate(target, [off], [rewards_of(off)], 1.0, max_touched=0.3, max_mean=9.0, l2=1e-3,
                   features=20)  # fmt: skip
    assert len(few.gate.weights) == 20
    fresh = (gated(few.gate, other)[other.pairs[:, :2]] > 0).any(1).mean()
    assert fresh < few.off[0].touched + 0.1


def test_another_sample_of_the_domain_sets_the_strength(model):
    target, off, tune = domain(0), elsewhere(1), domain(5, 60)
    fit = fit_gate(target, [off], [rewards_of(off)], 1.5, tune=tune)
    moved = gated(fit.gate, tune)[tune.chosen]
    assert moved.mean() == pytest.approx(1.5)
    assert fit.tuned == (moved > 0).mean()
    found = domain_profile(model, target, [off], tune=tune, method="gate", shift=0.5)
    plain, gate = tune.rewards(Heads.of(model, [{}, found.profile])).T
    assert (gate - plain)[tune.chosen].mean() == pytest.approx(0.5 * plain.std(), rel=1e-5)
    assert "0.5 sd on domain 5" in found.profile.description
    with pytest.raises(InputError, match="opens for none of the answers that set its strength"):
        fit_gate(target, [off], [rewards_of(off)], 1.5, tune=latent_set(np.zeros((4, F))))


def test_gate_refusals():
    target, off, flat = domain(0, 5), elsewhere(1, 9), np.ones(18)
    alone = latent_set(elsewhere(1, 9).matrix.toarray(), per_item=1)
    for sets, rewards, says in (
        ((target, off), flat, "elsewhere 1 has no pairs, or equal rewards only"),
        ((target, alone), rewards_of(alone), "made has no pairs, or equal rewards only"),
        ((domain(0, 1), off), rewards_of(off), "domain 0 needs at least 2 prompts"),
        ((latent_set(np.zeros((4, F))), latent_set(np.zeros((4, F)))), np.arange(4.0),
         "no feature is active"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            fit_gate(sets[0], [sets[1]], [rewards], 1.0)


def test_a_gate_without_room_says_so(model):
    target = domain(0)
    fit = fit_gate(target, [domain(1)], [rewards_of(domain(1))], 5.0)
    assert not fit.within
    found = domain_profile(model, target, [domain(1)], method="gate", shift=5.0)
    assert found.warning == "no threshold keeps the off-target sets within bounds"


def test_contrast_profiles_and_the_table(model, tmp_path):
    found = domain_profile(model, domain(0), [], method="contrast", top=3, factor=4.0, name="n")
    assert found.profile.changes == {0: Change(4.0), 1: Change(4.0)}
    write_contrast(found.contrast, tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0] == "feature,score,low,high,rank,rank_low,rank_high,selected"
    assert lines[1].split(",")[0] == "0"
    assert len(lines) == 1 + F
    noise = latent_set(sparse_rows(np.random.default_rng(0), 80, F))
    with pytest.raises(InputError, match="no feature is among the top 2 in 95 %"):
        domain_profile(model, noise, [], method="contrast", top=2, stability=0.95)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"method": "gate", "shift": float("nan")}, "shift must be a finite number, got nan"),
     ({"method": "contrast", "factor": float("inf")}, "factor must be a finite number, got inf"),
     ({"method": "bounded"}, "method bounded needs an off-target set")],
)  # fmt: skip
def test_find_refusals(options, says, model):
    with pytest.raises(InputError, match=says):
        domain_profile(model, domain(0, 5), [], **options)


def test_sets_are_merged_with_their_prompts_apart():
    both = merged([domain(0, 10), domain(0, 10)])
    assert both.matrix.shape == (40, F)
    assert len(set(both.groups)) == 20
    assert both.chosen.sum() == 20


def test_shifts_by_hand(model, tmp_path):
    """Two pairs with one feature each: every number can be written down."""
    model.score.weight.data = torch.tensor([[1.0, 2.0, *[0.0] * (F - 2)]])
    rows = np.zeros((4, F))
    rows[[0, 1, 2, 3], [0, 0, 1, 0]] = [3.0, 1.0, 1.0, 1.5]  # rewards 3, 1 | 2, 1.5
    one = latent_set(rows)
    profile = SteeringProfile({1: Change(multiply=0.5)})  # 2 becomes 1
    gate = SteeringProfile({}, Gate({0: 1.0}, 2.0, 3.0))  # 3 becomes 6
    names = ["half", "gate"]
    result = evaluate_steering(Heads.of(model, [{}, profile, gate]), names, [one], [])
    half, open_gate = result.shifts
    sd = np.std([3, 1, 2, 1.5])
    assert (half.sd, half.chosen.value, half.rejected.value) == pytest.approx((sd, -0.5 / sd, 0))
    assert (half.all.value, half.changes.value, half.moved) == pytest.approx(
        (-0.25 / sd, 0.5, 0.25)
    )
    assert (open_gate.all.value, open_gate.changes.value) == pytest.approx((0.75 / sd, 0.0))
    accuracy = {name: s.estimate.value for name, s in result.accuracies[0].scores.items()}
    assert accuracy == {"before": 1.0, "half": 0.5, "gate": 1.0}
    write_steering_report(result, {"a": 1}, tmp_path / "r")
    text = (tmp_path / "r" / "steering.md").read_text("utf-8")
    assert "| made (target) | half | 2 | -0.676 " in text
    assert "<svg" in (tmp_path / "r" / "steering.svg").read_text("utf-8")
    first = (tmp_path / "r" / "steering.svg").read_bytes()
    write_steering_report(result, {"a": 1}, tmp_path / "r")
    assert (tmp_path / "r" / "steering.svg").read_bytes() == first


def test_intervals_are_over_prompts(model):
    """Ten equal pairs a prompt are one piece of evidence, not ten."""
    rows = domain(0, 30).matrix.toarray().reshape(30, 1, 2, F).repeat(10, axis=1).reshape(-1, F)
    heads = Heads.of(model, [{}, {0: 8.0, 1: -8.0}])
    widths = []
    for per_prompt in (1, 10):
        one = latent_set(rows, per_prompt=per_prompt)
        (shift,) = evaluate_steering(heads, ["a"], [one], []).shifts
        widths.append(
            [e.high - e.low for e in (shift.chosen, shift.rejected, shift.all, shift.changes)]
        )
    apart, together = np.array(widths)
    assert together / apart == pytest.approx(np.sqrt(10), rel=0.25)


def test_crossed_profiles_judge_the_part_they_have_not_seen(model):
    one = domain(0, 40)
    profiles = [{0: 3.0}, {1: 3.0}, {2: 3.0}]
    heads = Heads.of(model, [{}, *profiles])
    result = evaluate_steering(heads, ["a", "b", "c"], [one], [], cross=True)
    (shift,) = result.shifts
    rewards = one.rewards(heads)
    expected = [
        rewards[n, part_of(one.benchmark.items[i].group, 3)] for n, i in enumerate(one.item)
    ]
    assert result.rewards[one.benchmark.name][:, 1].tolist() == expected
    moved = np.array(expected) - rewards[:, 0]
    assert shift.all.value == pytest.approx(moved.mean() / rewards[:, 0].std())
    assert (shift.profile, len(result.accuracies[0].scores)) == ("cross-fitted", 2)
    parts = {part_of(item.group, 3) for item in one.benchmark.items}
    assert parts == {1, 2, 3}  # else it would not see them all


def test_a_tie_that_breaks_is_a_change():
    pairs = np.array([[0, 1, 0], [2, 3, 1]])
    before, after = np.array([1.0, 1, 2, 1]), np.array([1.5, 1, 3, 1])
    assert changed_pairs(pairs, before, after).tolist() == [1.0, 0.0]


def test_evaluation_refusals(model):
    one, flat = domain(0, 5), latent_set(np.ones((4, F)))
    heads = Heads.of(model, [{}, {0: 2.0}])
    with pytest.raises(InputError, match="the target set is empty"):
        evaluate_steering(heads, ["a"], [], [one])
    with pytest.raises(InputError, match="two profiles are called 'before'"):
        evaluate_steering(heads, ["before"], [one], [])
    with pytest.raises(InputError, match="made: all rewards are"):
        evaluate_steering(heads, ["a"], [flat], [])
