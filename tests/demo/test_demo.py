"""The demo's corpus, its whole run on a tiny backbone, and its page."""

import re
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import tiny_sarm
from rich.console import Console

from sarm.demo import run as demo
from sarm.demo.corpus import local_passages, prose, split
from sarm.demo.report import write_report
from sarm.scorer import SARMScorer


def test_the_corpus_is_deterministic_and_shuffled_by_seed():
    first = local_passages(0)
    assert first == local_passages(0)
    assert first != local_passages(1)
    assert sorted(first) == sorted(local_passages(1))
    assert len(first) > 100
    assert all(len(p) > 200 for p in first)


def test_the_corpus_is_the_same_in_another_process():
    code = (
        "import hashlib; from sarm.demo.corpus import local_passages as f;"
        "print(hashlib.sha256('|'.join(f(3)).encode()).hexdigest())"
    )
    env = {**demo.os.environ, "PYTHONHASHSEED": "11"}
    other = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                           check=True).stdout.strip()  # fmt: skip
    import hashlib

    assert hashlib.sha256("|".join(local_passages(3)).encode()).hexdigest() == other


def test_prose_and_passages():
    assert prose("see [the docs](http://x.y) ![b](u)<br>") == "see the docs b"
    text = "\n\n".join(["a" * 900, "b" * 900, "c" * 100])
    assert split(text) == ["a" * 900, "b" * 900 + "\n\n" + "c" * 100]
    assert split("short") == []


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The whole demo on a tiny backbone, once."""
    folder = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    for name, value in {"STATES": 300, "PASSES": 2, "BATCH": 64, "FOLDS": 3}.items():
        patch.setattr(demo, name, value)
    backbone = tiny_sarm.save_backbone(folder / "tiny-backbone")
    with open(folder / "printed.txt", "w") as file:
        result = demo.run_demo(
            folder / "out", backbone=str(backbone), seed=0, console=Console(file=file, width=120)
        )
    patch.undo()
    return types.SimpleNamespace(
        result=result, out=folder / "out", printed=(folder / "printed.txt").read_text(),
        page=(folder / "out" / "report.html").read_text("utf-8"),
    )  # fmt: skip


def test_the_demo_prints_what_it_computed(ran):
    result = ran.result
    assert "2 of 4 layers" in ran.printed
    assert f"from {result.sae.states} states" in ran.printed
    assert result.sae.states == 300
    assert str(result.sarm.accuracy) in ran.printed
    assert str(result.probe.accuracy) in ran.printed
    for category in result.sarm.by_category:
        assert category in ran.printed
    assert f"{result.comparison.margin:+.6f}" in ran.printed
    assert f"feature {result.steering.feature} x 0" in ran.printed


def test_the_demos_sums_are_exact(ran):
    comparison, steering = ran.result.comparison, ran.result.steering
    parts = sum(d.value for d in comparison.differences) + comparison.rest
    assert parts == pytest.approx(comparison.margin, rel=1e-4, abs=1e-4)
    moved = steering.after - steering.before
    assert np.all(moved[~steering.active] == 0)  # the page says: to the bit
    assert np.any(moved[steering.active] != 0)


def test_the_saved_sarm_gives_the_explained_rewards(ran):
    scorer = SARMScorer.from_pretrained(ran.out / "sarm", max_length=demo.MAX_LENGTH)
    pair, comparison = ran.result.pair, ran.result.comparison
    rewards = scorer.score([pair.chosen, pair.rejected]).tolist()
    explained = [comparison.chosen.reward, comparison.rejected.reward]
    assert rewards == pytest.approx(explained, rel=1e-4, abs=1e-4)


def test_held_out_margins_come_from_heads_that_never_saw_the_pair():
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(90, 300))  # fitted, it would be separated perfectly
    held = demo._held_out(noise, ["a", "b", "c"] * 30, 0.0)
    assert 0.3 < held.accuracy.value < 0.7
    assert list(held.by_category) == ["a", "b", "c"]


def test_nothing_of_the_training_stays_but_the_sae(ran):
    assert not (ran.out / "sae" / ".progress").exists()
    assert (ran.out / "sae" / "sae.safetensors").exists()


# ---- edge cases that a weak backbone brings ------------------------------------------------


def test_a_pair_is_found_even_when_every_margin_is_wrong():
    assert demo._typical(np.array([-3.0, -1.0, -2.0])) == 1
    assert demo._typical(np.array([5.0, -1.0, 1.0, 3.0])) == 3


def test_steering_a_feature_that_is_active_everywhere():
    steering = demo.Steering(
        4, 0.0, np.array([1.0, 2.0]), np.array([0.0, 1.5]), np.array([True] * 2)
    )
    assert "moves the 2 of 2 answers" in demo._steering_line(steering)


# ---- the page ------------------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside(ran):
    assert "<svg" in ran.page
    assert not re.search(r"""(?:src|href|action|data)\s*=\s*["']?(?!#)[^"'\s>]""", ran.page)
    assert not re.search(r"@import|url\((?!#)", ran.page)
    assert not re.search(r"<(script|link|iframe|img|object|embed)\b", ran.page)


def test_the_page_shows_the_computed_numbers(ran):
    result = ran.result
    for text in (
        f"{result.comparison.margin:+.4f}",
        str(result.sarm.accuracy),
        str(result.probe.accuracy),
        f"{result.sae.fvu:.3f}",
        result.pair.extra["id"],
    ):
        assert text in ran.page


def test_answers_are_escaped(ran, tmp_path):
    evil = "<script>alert('x')</script> & <b>bold</b>"
    pair = replace(ran.result.pair, chosen=[*ran.result.pair.chosen[:-1],
                                            {"role": "assistant", "content": evil}])  # fmt: skip
    contexts = {5: [(1.0, "<i>where</i>", evil)]}
    made = replace(ran.result, pair=pair, contexts=contexts, backbone="<u>name</u>")
    page = write_report(made, ["a"] * 8, tmp_path / "r.html").read_text("utf-8")
    for raw in ("<script", "<b>bold", "<i>where", "<u>name"):
        assert raw not in page
    assert page.count("&lt;script&gt;") == 2
    assert "&amp;" in page


def test_the_page_is_written_whole_or_not_at_all(ran, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("earlier")
    monkeypatch.setattr("sarm.demo.report._steering", lambda result: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(ran.result, ["a"], path)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]
