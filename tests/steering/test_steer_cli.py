"""The commands on a tiny trained SARM: find, eval, bake, and the four audits."""

import json
import re
import sys

import pytest
import tiny_sarm
import torch

from sarm import cli
from sarm.backbone import load_backbone, load_tokenizer
from sarm.data import Record, to_pair
from sarm.evaluation.sources import read_suite
from sarm.sae import TopKSAE
from sarm.scorer import SARMScorer
from sarm.states import StateCache
from sarm.steering import read_profile
from sarm.tokens import ConversationEncoder
from sarm.training.reward import save_reward, train_reward


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A SARM in rm, its states, and preference and RM-Bench files."""
    folder = tmp_path_factory.mktemp("steer")
    backbone_dir = tiny_sarm.save_backbone(folder / "backbone")
    backbone, tokenizer = load_backbone(backbone_dir), load_tokenizer(backbone_dir)
    torch.manual_seed(0)
    rows = [row | {"source": f"s{i % 2}"} for i, row in enumerate(tiny_sarm.make_pairs(60))]
    tiny_sarm.write_jsonl(folder / "pairs.jsonl", rows)
    pairs = [to_pair(Record(str(i), row)) for i, row in enumerate(rows)]
    encoder = ConversationEncoder(tokenizer, 512)
    with StateCache(folder / "states.sqlite", backbone) as cache:
        fit = train_reward(backbone, TopKSAE(32, 64, 8), pairs, encoder, cache)
    save_reward(fit, tokenizer, folder / "rm")
    words = tiny_sarm.WORDS
    bench = [
        {"prompt": f"q {i}"} | {
            side: [f"{words[i % 17]} {end}", f"{words[i % 17]} so {end}", f"- **so** {end}"]
            for side, end in (("chosen", "thanks"), ("rejected", "ugh no"))
        }
        for i in range(24)
    ]  # fmt: skip
    (folder / "chat.json").write_text(json.dumps(bench), "utf-8")
    return folder


@pytest.fixture
def sarm(monkeypatch, capfd, place):
    def run(*args, code=0):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["sarm", *map(str, args)])
        got = 0
        try:
            cli.main()
        except SystemExit as stop:
            got = stop.code or 0
        done = capfd.readouterr()
        assert got == code, done.err
        return done.out if code == 0 else done.err

    return run


def common(place):
    return ["-m", place / "rm", "--cache", place / "states.sqlite", "--max-length", "512"]


def test_find_eval_and_bake(sarm, place, tmp_path):
    profile, out = tmp_path / "p.yaml", tmp_path / "out"
    pairs = place / "pairs.jsonl"
    told = sarm("steer", "find", *common(place), "--preferences", f"{pairs}#source=s0", "-o",
                profile, "--top", 3, "--factor", "-1", "--stability", 0.3, "--table",
                tmp_path / "t.csv")  # fmt: skip
    assert "rank correlation" in told
    scorer = SARMScorer.from_pretrained(place / "rm")
    read = read_profile(profile, model=scorer.model)
    assert 1 <= len(read.changes) <= 3
    sarm("steer", "eval", *common(place), "-p", profile, "--preferences", f"{pairs}#source=s0",
         "--off-rm-bench", f"{place / 'chat.json'}#2/2", "-o", out)  # fmt: skip
    page = json.loads((out / "steering.json").read_text("utf-8"))
    target, off = page["shifts"]
    assert (target["target"], off["target"]) == (True, False)
    assert sorted(p.name for p in out.iterdir()) == [
        "steering.json", "steering.md", "steering.svg"]  # fmt: skip
    told = sarm("steer", "-m", place / "rm", "-p", profile, "-o", tmp_path / "baked")
    assert f"{len(read.changes)} features changed, in head weights" in " ".join(told.split())
    talks = [c for i in read_suite([f"{pairs}#source=s0"])[0].items for c in i.conversations[:1]]
    before, after = scorer.score(talks), scorer.steer(read).score(talks)
    baked = SARMScorer.from_pretrained(tmp_path / "baked").score(talks)
    torch.testing.assert_close(baked, after)
    every = [c for i in read_suite([f"{pairs}#source=s0"])[0].items for c in i.conversations]
    sd = scorer.score(every).std(correction=0)
    assert target["chosen"]["value"] == pytest.approx(
        ((after - before).mean() / sd).item(), rel=1e-3, abs=1e-4
    )


def test_a_gate_is_baked_into_the_config(sarm, place, tmp_path):
    profile = tmp_path / "p.yaml"
    sarm("steer", "find", *common(place), "--rm-bench", f"{place / 'chat.json'}#1/2",
         "--off-preferences", place / "pairs.jsonl", "--method", "gate", "--limit", 6,
         "--tune-rm-bench", f"{place / 'chat.json'}#2/2", "-o", profile)  # fmt: skip
    read = read_profile(profile)
    assert len(read.when.weights) == 6
    assert "1 sd on RM-Bench chat (2/2)" in read.description
    told = sarm("steer", "eval", *common(place), "-p", profile, "--cross", "--rm-bench",
                f"{place / 'chat.json'}#2/2")  # fmt: skip
    assert "cross-fitted" in told
    told = sarm("steer", "-m", place / "rm", "-p", profile, "-o", tmp_path / "baked")
    assert "in config.json, behind its gate" in " ".join(told.split())
    baked = SARMScorer.from_pretrained(tmp_path / "baked")
    talks = [i.conversations[0] for i in read_suite(rm_bench=[str(place / "chat.json")])[0].items]
    want = SARMScorer.from_pretrained(place / "rm").steer(read).score(talks)
    torch.testing.assert_close(baked.score(talks), want)


@pytest.mark.parametrize(
    ("args", "says"),
    [(["find", "-o", "p"], "pass --rm-bench, --preferences or"),
     (["find", "-o", "p", "--preferences", "{}", "--method", "x"], "--method must be contrast"),
     (["find", "-o", "p", "--preferences", "{}", "--method", "gate"], "needs an off-target set"),
     (["find", "-o", "p", "--preferences", "{}", "--tune-preferences", "{}"],
      "--method contrast has no strength to set"),
     (["find", "-o", "p", "--preferences", "{}#3/2"], "part 3 of 2; expected 1 to 2"),
     (["find", "-o", "p", "--preferences", "{}#half"], "expected #I/N .* got 'half'"),
     (["find", "-o", "p", "--preferences", "{}#source=x*"], "no items left of 60"),
     (["find", "-o", "p", "--preferences", "{}#sauce=x*"], "no row has a field 'sauce'"),
     (["find", "-o", "p", "--rm-bench", "{}"], "prompt must be a string"),
     (["eval", "-p", "none.yaml"], "the target set is empty")],
)  # fmt: skip
def test_one_line_says_what_is_wrong(args, says, sarm, place):
    args = [a.format(place / "pairs.jsonl") for a in args]
    error = sarm("steer", args[0], "-m", place / "rm", *args[1:], code=2)
    assert re.search(says, " ".join(error.split())), error
    assert len(error.splitlines()) == 1


def test_audits(sarm, place, tmp_path):
    pairs = place / "pairs.jsonl"
    told = sarm("audit", "style", *common(place), "--rm-bench", place / "chat.json",
                "--preferences", pairs, "--styles", "praise,length",
                "-o", tmp_path / "s.csv")  # fmt: skip
    for name in ("length, RM-Bench", "markdown, RM-Bench", "praise, pairs, perturbed"):
        assert name in told
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 1 + 4 * 64
    sarm("audit", "debias", *common(place), "--rm-bench", place / "chat.json", "-o", tmp_path / "d",
         "--features", 10, "--splits", 2)  # fmt: skip
    text = (tmp_path / "d" / "debias.md").read_text("utf-8")
    assert "| as it is |" in text
    assert "2 random splits" in text
    told = sarm("audit", "preferences", *common(place), pairs, "-o", tmp_path / "p.jsonl")
    assert "of 60 labels contradict the features" in told
    reference = tmp_path / "r.safetensors"
    sarm("audit", "drift", *common(place), "--reference", reference, "--preferences", pairs)
    told = sarm("audit", "drift", *common(place), pairs, "--reference", reference,
                "-o", tmp_path / "d.json")  # fmt: skip
    assert "like the reference" in told
    assert json.loads((tmp_path / "d.json").read_text())["drifted"] is False


@pytest.mark.parametrize(
    ("args", "says"),
    [(["style"], "audit style: pass --rm-bench or --preferences"),
     (["style", "--preferences", "x", "--styles", "bold"], "unknown 'bold'; known are markdown"),
     (["drift", "--reference", "x"], "pass --preferences to write the reference, or a batch")],
)  # fmt: skip
def test_audit_refusals(args, says, sarm, place):
    assert says in sarm("audit", args[0], "-m", place / "rm", *args[1:], code=2)
