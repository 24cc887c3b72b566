"""What is planted is found: style features, a drifted batch, flipped labels; noise is not."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from latent_sets import latent_set, sparse_rows

from sarm import InputError
from sarm.audit import perturb
from sarm.audit.debias import (
    LEVELS,
    Outcome,
    Point,
    Spread,
    choose,
    halves,
    pair_levels,
    repeated,
    trade,
)
from sarm.audit.drift import Reference, benjamini_hochberg, measure_drift
from sarm.audit.preferences import audit_preferences
from sarm.audit.report import drift_fields, write_suspects, write_trade
from sarm.audit.style import perturbed, perturbed_twins, style_scores, triple_twins
from sarm.evaluation import rules
from sarm.evaluation.metrics import Benchmark, Item, Measure, standard_error
from sarm.ops import SparseLatents
from sarm.steering import SteeringProfile, read_profile

F = 30
MEASURES = tuple(Measure(name, {name: 1.0}) for name in LEVELS)


# ---- perturbations ---------------------------------------------------------------------------

PLAIN = "Boil water first. Then add the pasta. Wait ten minutes."
LISTED = "# Pasta\n\nDo **this**:\n\n1. Boil water\n2. Add *pasta*\n\n```sh\ncook 2 * 3\n```"


def test_markdown_is_added_and_removed():
    added = perturb.add_markdown(PLAIN)
    assert added == (
        "## Answer\n\n- **Boil water** first.\n- **Then add** the pasta.\n- **Wait ten** minutes."
    )
    assert perturb.remove_markdown(added) == "Answer\n\n" + PLAIN.replace(". ", ".\n")
    assert perturb.remove_markdown(LISTED) == (
        "Pasta\n\nDo this:\n\nBoil water\nAdd pasta\n\ncook 2 * 3\n"
    )
    assert perturb.remove_markdown(PLAIN) == PLAIN
    assert perturb.add_markdown(LISTED) == "## Answer\n\n" + LISTED


def test_order_length_and_praise():
    assert perturb.reorder("1. a\n2. b\n3. c\nend") == "1. c\n2. b\n3. a\nend"
    assert perturb.reorder("- a\n  more\n- b") == "- a\n  more\n- b"  # no run of items
    assert perturb.reorder("a\n\nb\n\nend") == "b\n\na\n\nend"
    assert perturb.reorder(PLAIN) == PLAIN
    padded = perturb.pad("a\n\nend")
    assert padded.startswith("a\n\n" + perturb.FILLER[0])
    assert padded.endswith("\n\nend")
    assert perturb.pad(PLAIN).endswith(PLAIN)
    assert perturb.flatter(PLAIN).startswith("Great question!")
    assert perturb.agree(PLAIN).endswith(PLAIN)


def test_perturbed_answers_keep_prompt_and_order():
    talk = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": PLAIN}]
    one = Benchmark("b", [Item([talk, talk], 1, "f:1", "how?")], rules.each(rules.pair), ())
    made = perturbed(one, ["markdown", "praise"])
    (item,) = made.items
    texts = [c[-1]["content"] for c in item.conversations]
    assert texts == [PLAIN, perturb.add_markdown(PLAIN), PLAIN, perturb.flatter(PLAIN)]
    assert all(c[0]["content"] == "how?" for c in item.conversations)
    with pytest.raises(InputError, match="position changes none of the answers"):
        perturbed(one, ["markdown", "position"])


# ---- style ------------------------------------------------------------------------------------


def styled(seed, prompts=150):
    """RM-Bench items: feature 0 follows markdown, 1 length, 2 tells chosen from rejected."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(prompts):
        base = sparse_rows(draw, 2, F, 0.3)
        for side in (0, 1):
            for style in range(3):
                row = base[side] + sparse_rows(draw, 1, F, 0.05)[0]
                row[0] = (style == 2) * draw.gamma(4, 0.25)
                row[1] = (style >= 1) * draw.gamma(4, 0.25)
                row[2] = (side == 0) * draw.gamma(4, 0.25)
                rows.append(row)
    return latent_set(rows, 3, 6, f"RM {seed}", judge=rules.each(rules.style_matrix),
                      measures=MEASURES)  # fmt: skip


HEAD = np.array([1.5, 1.0, 1.2, *([0.05] * (F - 3))])


def test_planted_style_features_are_found():
    one = styled(0)
    length, markdown = (style_scores(one, twins, HEAD) for twins in triple_twins(one))
    for scores, feature in ((length, 1), (markdown, 0)):
        assert np.argmax(np.abs(scores.reward)) == feature
        assert scores.low[feature] > 1
        assert scores.clear[feature]
        assert scores.clear.sum() <= 6  # 5 % of 30 by chance, and the planted one
        assert scores.reward.sum() == pytest.approx(scores.total.value)
        assert scores.total.low <= scores.total.value <= scores.total.high
        assert (scores.reward_low <= scores.reward_high).all()
    rows = one.matrix.toarray()
    difference = rows[2::3, 0] - rows[1::3, 0]
    assert markdown.effect[0] == pytest.approx(difference.mean() / difference.std())
    assert markdown.reward[0] == pytest.approx(1.5 * difference.mean())


def test_style_intervals_are_over_prompts():
    """Ten equal items a prompt are one piece of evidence, not ten."""
    rows = styled(0, 20).matrix.toarray().reshape(20, 1, 6, F).repeat(10, axis=1).reshape(-1, F)
    widths = []
    for per_prompt in (1, 10):
        one = latent_set(rows, 3, 6, per_prompt=per_prompt)
        scores = style_scores(one, triple_twins(one)[1], HEAD)
        widths.append([scores.total.high - scores.total.low, scores.high[0] - scores.low[0]])
    assert np.divide(*widths[::-1]) == pytest.approx(np.sqrt(10), rel=0.25)


def test_a_shift_that_never_varies_is_an_effect():
    rows = np.zeros((24, F))
    rows[2::3, 0] = 0.7  # markdown adds this, always
    one = latent_set(rows, 3, 6)
    length, markdown = (style_scores(one, twins, HEAD) for twins in triple_twins(one))
    assert markdown.clear.nonzero()[0].tolist() == [0]
    assert markdown.effect[0] == pytest.approx(1e6)
    assert not length.clear.any()


def test_twins_of_perturbations_and_refusals():
    one = latent_set(sparse_rows(np.random.default_rng(0), 12, F), 1, 4)
    first, second = perturbed_twins(one, ["markdown", "length"])
    assert (first.plain.tolist(), first.styled.tolist()) == ([0, 4, 8], [1, 5, 9])
    assert (second.plain.tolist(), second.styled.tolist()) == ([2, 6, 10], [3, 7, 11])
    with pytest.raises(InputError, match="needs 3 chosen and 3 rejected"):
        triple_twins(one)
    with pytest.raises(InputError, match="at least 2 prompts, got 1"):
        style_scores(*(lambda s: (s, triple_twins(s)[0]))(styled(0, 1)), HEAD)


HEAD_ROW = torch.tensor(HEAD[None], dtype=torch.float32)


def test_debiasing_trades_style_for_hard_accuracy(tmp_path):
    fit, held = styled(0), styled(1)
    found = trade(fit, held, HEAD_ROW, features=4, max_drop=0.02)
    assert found.chosen is not None
    gain = found.outcome().gain
    assert gain["hard"] > 0.2
    assert gain["normal"] > -0.02
    assert gain["easy"] > -0.03
    ablate = next(p for p in found.points if p.kind == "ablate" and p.strength == 2)
    assert set(ablate.profile.changes) == {0, 1}
    assert all(0 <= c.multiply <= 1 for p in found.points for c in p.profile.changes.values())
    again = repeated(styled(2, 30), HEAD_ROW, 2, features=4)
    write_trade(found, tmp_path, max_drop=0.02, splits=again, model="f00d")
    profile = read_profile(tmp_path / "profile.yaml")
    assert (profile.changes, profile.model) == (found.chosen.profile.changes, "f00d")
    assert "fitted and chosen on 150 prompts of RM 0" in profile.description
    text = (tmp_path / "debias.md").read_text("utf-8")
    assert "(chosen)" in text
    assert "2 random splits: easy and normal each lose at most 2 points in" in text
    page = json.loads((tmp_path / "debias.json").read_text("utf-8"))
    assert page["splits"]["outcomes"] == [asdict(one) for one in again]
    none = trade(fit, held, HEAD_ROW, features=4, max_drop=-1.0)
    assert none.chosen is None
    assert none.outcome() == Outcome(None, dict.fromkeys(LEVELS, 0.0))
    write_trade(none, tmp_path / "none", max_drop=-1.0)
    assert not (tmp_path / "none" / "profile.yaml").exists()


def test_what_is_held_out_takes_no_part():
    """Other prompts to judge on: the same curve and choice, other results."""
    fit = styled(0, 40)
    one, other = (trade(fit, styled(seed, 40), HEAD_ROW, features=4) for seed in (1, 2))
    assert one.chosen is not None
    assert one.chosen.strength == other.chosen.strength
    for a, b in zip(one.points, other.points, strict=True):
        assert (a.profile, a.fitted, a.error) == (b.profile, b.fitted, b.error)
    assert [p.held for p in one.points] != [p.held for p in other.points]


def test_multipliers_are_judged_out_of_fold():
    """Answers without any rule: what fits them gains nothing on prompts that were held out."""
    draw = np.random.default_rng(0)
    noise = [latent_set(sparse_rows(draw, 6 * n, 200), 3, 6, f"noise {n}",
                        judge=rules.each(rules.style_matrix), measures=MEASURES)
             for n in (40, 400)]  # fmt: skip
    head = torch.from_numpy(draw.normal(size=(1, 200)).astype(np.float32))
    found = trade(*noise, head, features=200, high=5.0, low=-5.0)
    strong = next(p for p in found.points if (p.kind, p.strength) == ("multiply", 1.0))
    for name in LEVELS:
        assert abs(strong.fitted[name] - strong.held[name]) < 0.1
        assert strong.fitted[name] < 0.62  # in sample: above 0.9


def test_the_choice_keeps_a_margin():
    start = {"easy": 0.8, "normal": 0.5, "hard": 0.1}
    error = dict.fromkeys(LEVELS, 0.01)

    def point(strength, easy, normal, hard):
        fitted = {"easy": easy, "normal": normal, "hard": hard}
        return Point("multiply", strength, SteeringProfile(), fitted, error, {})

    points = [point(1, 0.81, 0.5, 0.2), point(2, 0.795, 0.6, 0.3), point(3, 0.9, 0.48, 0.4)]
    assert choose(points, start, 0.01, 0.0) is points[1]  # a loss of 0.005, within 0.01
    assert choose(points, start, 0.01, 0.4) is points[1]  # 0.005 + 0.4 x 0.01
    assert choose(points, start, 0.01, 0.6) is points[0]  # 0.005 + 0.6 x 0.01 is too much
    assert choose(points, start, 0.01, 1.5) is None
    assert choose(points[:1], start | {"hard": 0.2}, 0.01, 0.0) is None  # no gain on hard


def test_errors_are_over_prompts():
    """Nine pairs of a prompt move together: the error is that of prompts, not of pairs."""
    values, prompts = np.repeat([1.0, 0, 0, 1, 0], 9), np.repeat(np.arange(5), 9)
    assert standard_error(values, prompts) == pytest.approx(
        np.std([1, 0, 0, 1, 0], ddof=1) / 5**0.5
    )
    assert standard_error(values, prompts * 0) == np.inf
    one = styled(0, 40)
    twice = replace(
        one,
        benchmark=replace(one.benchmark, items=one.benchmark.items * 2),
        latents=SparseLatents(*(part.repeat(2, 1) for part in one.latents)),
    )
    few, many = (trade(s, styled(1, 40), HEAD_ROW, features=4) for s in (one, twice))
    for a, b in zip(few.points, many.points, strict=True):
        if a.kind == "ablate":  # of the multipliers, the fit may differ a little
            assert b.error == pytest.approx(a.error)


def test_halves_share_no_prompt_and_no_domain_is_missed():
    one = styled(0, 21)
    items = [replace(item, part=("chat", "math")[i % 2], group=f"p {i // 2}")
             for i, item in enumerate(one.benchmark.items)]  # fmt: skip
    items += [replace(item, part="code", group=f"c {i}") for i, item in enumerate(items[:4])]
    rows = np.r_[0 : 6 * 21, 0:24]
    latents = SparseLatents(one.latents.vals[rows], one.latents.idx[rows])
    both = replace(one, benchmark=replace(one.benchmark, items=items), latents=latents)
    seen = set()
    for seed in range(4):
        a, b = halves(both, np.random.default_rng(seed))
        groups = [{item.group for item in half.benchmark.items} for half in (a, b)]
        assert not groups[0] & groups[1]
        assert sum(item.part == "code" for item in a.benchmark.items) == 2
        assert len(a.benchmark.items) + len(b.benchmark.items) == 25
        where = [item.where for item in a.benchmark.items]
        source = [i for i, item in enumerate(items) if item.group in groups[0]]
        assert where == [items[i].where for i in source]
        expected = both.matrix[np.repeat(source, 6) * 6 + np.tile(np.arange(6), len(source))]
        assert (a.matrix != expected).nnz == 0
        seen.add(frozenset(groups[0]))
    assert len(seen) > 1


def test_spread_by_hand():
    def one(*gain):
        return Outcome("multiply 1", dict(zip(LEVELS, gain, strict=True)))

    none = Outcome(None, dict.fromkeys(LEVELS, 0.0))
    spread = Spread.of(
        [one(0.0, 0.02, 0.2), one(-0.02, 0.01, 0.1), none, one(-0.03, 0.0, 0.3)], 0.01
    )
    assert (spread.splits, spread.unchanged) == (4, 1)
    assert spread.mean == pytest.approx({"easy": -0.0125, "normal": 0.0075, "hard": 0.15})
    assert (spread.low["easy"], spread.high["hard"]) == pytest.approx((-0.03, 0.3))
    assert spread.sd["hard"] == pytest.approx(np.std([0.2, 0.1, 0.0, 0.3]))
    assert (spread.each, spread.together) == (0.5, 0.75)
    assert Spread.of([one(0.57 - 0.58, 0.0, 0.1)], 0.01).each == 1.0  # -0.010000000000000009


def test_debias_refusals():
    one = styled(0, 4)
    part = replace(one.benchmark, items=[replace(i, part="math") for i in one.benchmark.items])
    with pytest.raises(InputError, match="too few prompts of '' to fit on some"):
        trade(one, replace(one, benchmark=part), HEAD_ROW)
    with pytest.raises(InputError, match="multipliers must include 1"):
        trade(one, one, HEAD_ROW, low=1.5, high=2.0)
    with pytest.raises(InputError, match="at least 2 prompts, got 1"):
        trade(*halves(styled(0, 2), np.random.default_rng(0)), HEAD_ROW)
    silent = latent_set(np.zeros((24, F)), 3, 6, judge=rules.each(rules.style_matrix),
                        measures=MEASURES)  # fmt: skip
    with pytest.raises(InputError, match="no feature's style effect is clear of 0"):
        trade(silent, silent, HEAD_ROW)


def test_levels_follow_the_rule():
    one = styled(0, 2)
    level = pair_levels(one)
    rewards = one.matrix @ HEAD
    wins = rewards[one.pairs[:, 0]] > rewards[one.pairs[:, 1]]
    judged = one.benchmark.judge(
        one.benchmark.items, [(rewards[:3, None], rewards[3:6, None]),
                              (rewards[6:9, None], rewards[9:, None])])  # fmt: skip
    for number, name in enumerate(("easy", "normal", "hard")):
        expected = np.mean([row[name][0] for row in judged])
        assert wins[level == number].mean() == pytest.approx(expected)


# ---- drift ------------------------------------------------------------------------------------


def answers(seed, prompts, per_prompt=4):
    """Answers of a prompt are alike."""
    draw = np.random.default_rng(seed)
    base = np.repeat(sparse_rows(draw, prompts, F, 0.3), per_prompt, axis=0)
    own = sparse_rows(draw, prompts * per_prompt, F, 0.2)
    return latent_set(base + own, 1, 1, f"answers {seed}", per_prompt)


@pytest.fixture(scope="module")
def reference():
    one = answers(0, 400)
    return Reference.of(one.matrix, one.groups, HEAD, "f00d")


def test_the_null_is_calibrated(reference):
    """Batches of the same kind pass the 10 % threshold about 10 % of the time."""
    far = 0
    for seed in range(60):
        one = answers(100 + seed, 25)
        far += measure_drift(reference, one.matrix, one.groups, alpha=0.1, nulls=100).drifted
    assert 1 <= far <= 14  # binomial(60, 0.1): beyond this once in a thousand


def test_many_features_make_few_false_discoveries(reference):
    """30 features, 12 batches without drift: 72 would pass a test of each at the 20 % level."""
    false = 0
    for seed in range(12):
        one = answers(200 + seed, 25)
        false += measure_drift(
            reference, one.matrix, one.groups, alpha=0.2, nulls=50
        ).significant.sum()
    assert false <= 24


def test_hacking_is_flagged_and_its_feature_named(reference):
    batch = answers(7, 40)
    rows = batch.matrix.toarray()
    rows[:, 5] += 1.0  # a feature without much weight: drifts, is hardly rewarded
    rows[:, 0] += 1.0  # this one is
    found = measure_drift(reference, latent_set(rows, 1, 1).matrix, batch.groups)
    assert found.drifted
    assert found.suspicious
    assert found.significant[[0, 5]].all()
    assert found.significant.sum() <= 4
    assert drift_fields(found)["features"][0]["feature"] == 0
    worse = rows.copy()
    worse[:, 0] = 0
    found = measure_drift(reference, latent_set(worse, 1, 1).matrix, batch.groups)
    assert found.drifted
    assert not found.suspicious  # its reward fell


def test_a_reference_is_read_back(reference, tmp_path):
    reference.save(tmp_path / "r.safetensors")
    back = Reference.load(tmp_path / "r.safetensors", "f00d")
    one = answers(3, 20)
    a, b = (
        measure_drift(r, one.matrix, one.groups, alpha=0.1, nulls=20) for r in (reference, back)
    )
    assert a.distance == pytest.approx(b.distance, rel=1e-6)
    assert a.threshold == pytest.approx(b.threshold, rel=1e-4)
    with pytest.raises(InputError, match="of another model"):
        Reference.load(tmp_path / "r.safetensors", "beef")
    (tmp_path / "x").write_text("no")
    with pytest.raises(InputError, match="not a drift reference"):
        Reference.load(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        Reference.load(tmp_path / "none")


def test_drift_refusals(reference):
    one = answers(3, 20)
    for matrix, alpha, says in (
        (one.matrix[:0], 0.01, "the batch is empty"),
        (one.matrix[:, :5], 0.01, "has 5 latents, not 30"),
        (one.matrix, 1.0, r"alpha must be in \(0, 1\)"),
        (one.matrix, 0.001, "with 500 null batches alpha must be at least 0.0020, got 0.001"),
    ):
        with pytest.raises(InputError, match=says):
            measure_drift(reference, matrix, one.groups[: matrix.shape[0]], alpha=alpha)


def test_benjamini_hochberg_by_hand():
    p = np.array([0.001, 0.2, 0.011, 0.03, 0.9])  # limits at 5 %: .01 .02 .03 .04 .05
    assert benjamini_hochberg(p, 0.05).tolist() == [True, False, True, True, False]
    assert not benjamini_hochberg(np.array([0.03, 0.9]), 0.05).any()


# ---- labels -----------------------------------------------------------------------------------


def test_planted_flips_are_found(tmp_path):
    draw = np.random.default_rng(0)
    rows = sparse_rows(draw, 1200, F, 0.4)
    reward = rows @ np.array([2.0, -2.0, 1.5, -1.5, *([0.3] * (F - 4))])
    for a in range(0, 1200, 2):  # better answer first
        if reward[a] < reward[a + 1]:
            rows[[a, a + 1]] = rows[[a + 1, a]]
    gap = np.abs(reward[0::2] - reward[1::2])
    flipped = draw.choice(np.flatnonzero(gap > np.median(gap)), 40, replace=False)
    for i in flipped:
        rows[[2 * i, 2 * i + 1]] = rows[[2 * i + 1, 2 * i]]
    found = audit_preferences(latent_set(rows), l2=0.01)
    listed = [int(s.where[5:-1]) for s in found.suspects]
    assert len(set(listed[:50]) & set(flipped)) >= 36  # recall 90 % among the 50 worst
    assert len(set(listed) & set(flipped)) >= 39
    assert found.suspects[0].margin == found.margins.min()
    assert found.suspects[0].probability < 0.1
    assert all(part < 0 for _, part in found.suspects[0].features)
    write_suspects(found, tmp_path / "s.jsonl")
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == len(found.suspects)


def test_labels_are_judged_out_of_fold_by_prompts():
    """Noise, each pair four times a prompt: in sample a head would have nearly all of it right."""
    rows = sparse_rows(np.random.default_rng(0), 160, 150, 0.4)
    rows = rows.reshape(80, 1, 2, 150).repeat(4, axis=1).reshape(-1, 150)
    found = audit_preferences(latent_set(rows, per_prompt=4), l2=1e-3)
    assert 0.35 < found.accuracy < 0.65


def test_label_refusals():
    rows = sparse_rows(np.random.default_rng(0), 12, F)
    with pytest.raises(InputError, match="one chosen and one rejected"):
        audit_preferences(latent_set(rows, 1, 3))
    with pytest.raises(InputError, match="at least 2 prompts"):
        audit_preferences(latent_set(rows, per_prompt=6))
