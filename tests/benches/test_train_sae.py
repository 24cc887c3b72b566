"""Suite `train-sae`: both ways learn the same, and the rows of a run."""

from dataclasses import replace

import pytest
import run
import train_sae
from suite import Options

from sarm.backbone import load_backbone

TEXTS = ["the cat sat on a mat. it was terribly cold! nobody asked why?", "the dog ran. " * 9] * 6


@pytest.fixture
def parts(make_scorer):
    scorer = make_scorer()
    return scorer.model.model, scorer.tokenizer


@pytest.mark.parametrize("kind", ["sentence", "token"])
def test_both_learn_the_same_per_token(parts, kind, monkeypatch):
    monkeypatch.setattr(train_sae, "STATES", {"sentence": 8, "token": 32})
    config = replace(train_sae.published_config(kind, n_latents=64, k=4), lr=1e-3)
    ours = train_sae.sparse(*parts, TEXTS, config)
    theirs = train_sae.published(*parts, TEXTS, config)
    assert len(ours) == len(theirs) > 4
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    # later ones part a little: unit rows every step, or every 10th
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours[-1] < ours[0]


def test_rows_of_a_run(parts, monkeypatch):
    monkeypatch.setattr(train_sae, "STATES", {"sentence": 8, "token": 32})
    backbone, tokenizer = parts
    backbones = {"published fp32": backbone, "sarm fp32": backbone}
    config = train_sae.published_config("token", 64, 4)
    options = Options(runs=1)
    theirs, ours = train_sae.compare("here", TEXTS, tokenizer, backbones, config, options)
    assert ours.ratios.keys() == {"published fp32"}
    assert "x published fp32" in ours.note
    for row in (theirs, ours):
        assert row.ms > 0
        tokens = int(row.shape.split(" documents, ")[1].split(" tokens")[0])
        assert row.accuracy["tokens_per_s"] == pytest.approx(1e3 * tokens / row.ms)
        assert row.accuracy["loss, quarter 4"] < row.accuracy["loss, quarter 1"]


def test_the_plot_has_a_panel_for_each_kind(parts, monkeypatch, tmp_path):
    monkeypatch.setattr(train_sae, "STATES", {"sentence": 8, "token": 32})
    backbone, tokenizer = parts
    rows = []
    for n_latents in (32, 64):
        config = train_sae.published_config("token", n_latents, 4)
        rows += train_sae.compare("a", TEXTS, tokenizer, {"sarm fp32": backbone}, config, Options())
    train_sae.plot(rows, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert "<svg" in text


def test_demo_answers_without_data():
    source, texts = train_sae.documents(Options(documents=3))
    assert source == "demo answers"
    assert len(texts) == 3


def test_only_what_exists(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run.main(["--device", "cpu", "--suite", "train-sae", "--only", "x"])
    assert exit_info.value.code == 2
    assert "cases: train-sae, sentence, train-sae, token" in capsys.readouterr().err


def test_int8_says_why_it_is_missing(backbone_dir):
    def load(quantization):
        raise RuntimeError("no kernels")

    assert str(train_sae.int8(load)) == "no kernels"
    assert train_sae.int8(lambda quantization: load_backbone(backbone_dir)) is not None
