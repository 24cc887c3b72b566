"""Collected statistics and contexts, against a plain loop over dense activations."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny_sarm
import torch

from sarm.data import BadRecords, read_preferences
from sarm.errors import InputError
from sarm.features import FeatureStore, contexts
from sarm.features import collect as collect_module
from sarm.features.collect import CollectOptions, collect
from sarm.features.style import markdown_marks

OPTIONS = CollectOptions(contexts=3, window=12, block=4)  # as the fixture `database`


def dense(scorer, conversation):
    """(T, n_latents) activations at every token, by the plain forward."""
    (encoded,) = scorer.encode([conversation])
    with torch.inference_mode():
        states = scorer.model.model(input_ids=torch.tensor([encoded.ids])).last_hidden_state[0]
        vals, idx = scorer.model.sae.encode(states)
    return torch.zeros(len(encoded.ids), scorer.model.sae.n_latents).scatter_(1, idx, vals).numpy()


@pytest.fixture(scope="module")
def responses(scorer, pairs):
    """(activations at every token, text of the response, side) of every response."""
    return [
        (dense(scorer, side), side[-1]["content"], sign)
        for pair in read_preferences(pairs)
        for side, sign in ((pair.chosen, 1), (pair.rejected, -1))
    ]


def test_statistics_are_those_of_a_plain_loop(scorer, database, responses):
    z = np.stack([tokens[-1] for tokens, _, _ in responses]).astype(np.float64)
    side = np.array([sign for _, _, sign in responses])
    weight = scorer.model.score.weight[0].detach().numpy()
    c, j = z[side == 1].sum(0), z[side == -1].sum(0)
    contrast = (c - j) / (c + j + (c + j).mean())
    size = np.log1p([len(text) for _, text, _ in responses])
    with FeatureStore(database) as store:
        found = store.features("id", alive=False)
        assert [f.id for f in found] == list(range(64))
        assert store.meta["rows"] == "28"
        for f in found:
            own = z[:, f.id]
            active = own[own != 0]
            assert f.rows == len(active)
            assert f.frequency == len(active) / 28
            assert f.contribution == pytest.approx(weight[f.id] * own.mean(), abs=1e-4)
            assert f.weight == weight[f.id]
            assert (f.chosen, f.rejected) == pytest.approx((c[f.id], j[f.id]), abs=1e-4)
            assert f.contrast == pytest.approx(contrast[f.id], abs=1e-4)
            assert sum(f.histogram["counts"]) + f.histogram["negative"] == len(active)
            if len(active):
                assert (f.mean, f.max) == pytest.approx((active.mean(), active.max()), abs=1e-4)
                expected = np.corrcoef(own, size)[0, 1]
                assert f.length_corr == pytest.approx(expected, abs=1e-3)
                assert f.markdown_corr is None  # no response has any
        total = sum(f.contribution for f in found)
        assert total == pytest.approx(float(store.meta["reward_mean"]), abs=1e-9)


def test_top_contexts_are_the_largest_with_their_tokens(scorer, database, responses):
    z = np.stack([tokens[-1] for tokens, _, _ in responses])
    with FeatureStore(database) as store:
        for f in store.features("id"):
            top = store.contexts(f.id)
            largest = np.sort(z[z[:, f.id] != 0, f.id])[::-1][:3]
            assert [c.activation for c in top] == pytest.approx(largest.tolist(), abs=1e-4)
            for c in top:
                line, side = c.source.rsplit(":", 1)[1].split()
                row = 2 * (int(line) - 1) + (side == "(rejected)")
                tokens = responses[row][0]
                assert c.position == len(tokens) - 1
                assert len(c.tokens) == 12
                assert c.activations == pytest.approx(tokens[-12:, f.id].tolist(), abs=1e-3)
                assert c.text.endswith(responses[row][1][-5:] + "<|im_end|>")


def test_samples_are_not_among_the_top_and_favour_none(scorer, tmp_path):
    """Over many seeds every occurrence that is not a top one is drawn about as often."""
    rows = [{"prompt": "q", "completion": "the cat " * i} for i in range(1, 13)]
    source = tiny_sarm.write_jsonl(tmp_path / "in.jsonl", rows)
    drawn = np.zeros(12)
    for seed in range(40):
        out = tmp_path / f"{seed}.db"
        collect(scorer, [source], out, CollectOptions(contexts=2, window=2, seed=seed))
        with FeatureStore(out) as store:
            always = [f.id for f in store.features("id") if f.rows == 12]
            assert always
            top = {c.source for c in store.contexts(always[0], "top")}
            sample = [c.source for c in store.contexts(always[0], "sample")]
        assert not top & set(sample)
        for where in sample:
            drawn[int(where.rsplit(":", 1)[1]) - 1] += 1
    assert (drawn == 0).sum() == 2  # the top ones
    others = drawn[drawn > 0]
    assert others.min() > 0
    assert others.max() < 24


def dump(path):
    """Everything but the words of the search index."""
    with FeatureStore(path) as store:
        return [
            store.rows(f"SELECT * FROM {table} ORDER BY 1, 2")
            for table in ("meta", "feature", "context", "span", "progress")
        ]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_killed_run_goes_on_to_the_same_bits(tiny_scorer, pairs, tmp_path, quantization):
    scorer = tiny_scorer(quantization=quantization)
    whole, cut = tmp_path / "whole.db", tmp_path / "cut.db"
    collect(scorer, [pairs], whole, OPTIONS)

    class Killed(BaseException):
        pass

    def stop(rows, seen=[]):  # noqa: B006
        seen.append(rows)
        if len(seen) % 3 == 0:
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            collect(scorer, [pairs], cut, OPTIONS, progress=stop)
    report = collect(scorer, [pairs], cut, OPTIONS)
    assert report.resumed >= 16
    assert report.rows == 28
    assert dump(cut) == dump(whole)


def test_a_process_killed_with_sigkill(scorer, pairs, database, tmp_path):
    """Within a transaction, its statements done: the database opens, and the run goes on."""
    child = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(tiny_sarm.__file__)!r})
import torch, tiny_sarm, sarm
from sarm.features import collect as c
backbone = sarm.load_backbone(
    tiny_sarm.save_backbone({str(tmp_path / "b")!r}), dtype=torch.float32, device="cpu")
torch.manual_seed(0)
model = sarm.SarmForSequenceClassification.from_parts(
    backbone, sarm.TopKSAE(32, 64, 6), torch.randn(1, 64))
scorer = sarm.SARMScorer(model, tiny_sarm.make_tokenizer())
save, seen = c._Run._save, []
def killed(self, before):
    save(self, before)
    seen.append(before)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
c._Run._save = killed
options = c.CollectOptions(contexts=3, window=12, block=4)
c.collect(scorer, [{str(pairs)!r}], {str(tmp_path / "cut.db")!r}, options)
"""
    killed = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert collect(scorer, [pairs], tmp_path / "cut.db", OPTIONS).resumed == 16
    assert dump(tmp_path / "cut.db") == dump(database)


def test_another_input_model_or_option_is_not_taken_up(scorer, tiny_scorer, pairs, tmp_path):
    out = tmp_path / "out.db"
    with pytest.raises(RuntimeError):
        collect(scorer, [pairs], out, OPTIONS, progress=stop_after(2))
    other = tiny_sarm.write_jsonl(tmp_path / "other.jsonl", tiny_sarm.make_pairs(9, seed=5))
    with pytest.raises(InputError, match="an unfinished run with another input"):
        collect(scorer, [other], out, OPTIONS)
    with pytest.raises(InputError, match="an unfinished run with another features"):
        collect(tiny_scorer(seed=1), [pairs], out, OPTIONS)
    with pytest.raises(InputError, match="an unfinished run with another options"):
        collect(scorer, [pairs], out, CollectOptions(contexts=4))
    collect(scorer, [pairs], out, OPTIONS)
    with pytest.raises(InputError, match="exists already"):
        collect(scorer, [pairs], out, OPTIONS)
    assert collect(scorer, [other], out, OPTIONS, overwrite=True).rows == 18


def stop_after(calls):
    seen = []

    def progress(rows):
        seen.append(rows)
        if len(seen) > calls:
            raise RuntimeError("stop")

    return progress


def test_texts_conversations_and_bad_records(scorer, tmp_path):
    rows = [
        {"text": "the cat sat. **on** a mat"},
        {"prompt": "q", "response": "the cat"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"chosen": "q the cat", "rejected": "q a mat"},
        {"prompt": "q"},
        {"chosen": "only this"},
        {"text": 3},
        {"messages": [{"role": "user", "content": "q"}]},
    ]
    source = tiny_sarm.write_jsonl(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.db"
    with pytest.raises(InputError, match=r"in\.jsonl:5: expected `messages`"):
        collect(scorer, [source], out, CollectOptions(block=8))
    assert not out.exists()  # nothing was done
    bad = BadRecords(skip=True)
    report = collect(scorer, [source], out, CollectOptions(block=2), bad=bad)
    assert (report.rows, report.bad) == (5, 4)
    with FeatureStore(out) as store:
        assert (store.meta["chosen"], store.meta["rejected"]) == ("1", "1")


def test_nothing_usable_leaves_nothing(scorer, tmp_path):
    source = tiny_sarm.write_jsonl(tmp_path / "in.jsonl", [{"a": 1}])
    with pytest.raises(InputError, match="no usable response"):
        collect(scorer, [source], tmp_path / "out.db", bad=BadRecords(skip=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


def test_two_runs_into_one_database(scorer, pairs, tmp_path):
    """The second finds the first one's blocks; whichever comes late stops with one line."""
    out, told = tmp_path / "out.db", []

    def other(rows):
        told.append(rows)
        if len(told) == 2:
            collect(scorer, [pairs], out, OPTIONS)

    with pytest.raises(InputError, match="another process is collecting into it"):
        collect(scorer, [pairs], out, OPTIONS, progress=other)
    with FeatureStore(out) as store:
        assert store.meta["rows"] == "28"
        assert store.meta["complete"] == "true"


def test_a_full_disk_is_one_line_and_what_was_committed_stays(scorer, pairs, tmp_path, monkeypatch):
    out = tmp_path / "out.db"
    prepare = FeatureStore._prepare

    def limited(self):
        prepare(self)
        self._db.execute("PRAGMA max_page_count=60")  # SQLite says the same as of a full disk

    monkeypatch.setattr(FeatureStore, "_prepare", limited)
    with pytest.raises(InputError, match=r"cannot be used now .*full"):
        collect(scorer, [pairs], out, CollectOptions(contexts=20, window=64, block=1))
    monkeypatch.undo()
    report = collect(scorer, [pairs], out, CollectOptions(contexts=20, window=64, block=1))
    assert report.rows == 28
    assert 0 < report.resumed < 28


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("plain, 3 * 4 * 5 and snake_case_name", 0),
        ("# Title\n\n- one\n- **two**\n3. three", 5),
        ("```python\nx = 1\n```\nuse `x`", 3),
        ("| a | b |\n|---|---|", 2),
    ],
)
def test_marks_of_markdown(text, marks):
    assert markdown_marks(text) == marks


def test_tokens_join_to_the_text(scorer):
    from sarm.features.text import TokenTexts

    text = "naïve 🙂 日本 the cat"
    ids = scorer.tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = TokenTexts(scorer.tokenizer)(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert json.loads(json.dumps(texts)) == texts


def test_tokens_are_kept_once_and_only_with_a_context(scorer, pairs, tmp_path, monkeypatch):
    sizes = []
    sweep = contexts.sweep

    def counted(db, used):
        sweep(db, used)
        sizes.append((db.execute("SELECT count(*) FROM span").fetchone()[0], len(used)))

    monkeypatch.setattr(contexts, "sweep", counted)
    monkeypatch.setattr(collect_module, "SPANS", 0)
    options = CollectOptions(contexts=1, window=2, block=2)
    collect(scorer, [pairs], tmp_path / "f.db", options)
    assert len(sizes) > 2  # on the way, not at the end alone
    assert all(left == used for left, used in sizes)
    with FeatureStore(tmp_path / "f.db") as store:
        spans = store.rows("SELECT id FROM span ORDER BY id")
        assert spans == store.rows("SELECT DISTINCT span FROM context ORDER BY span")
        assert len(spans) < 28
        (most,) = store.rows("SELECT count(*) FROM context GROUP BY span ORDER BY 1 DESC")[0]
        assert most > 1


def test_overwriting_keeps_what_is_there_until_the_input_is_known_to_be_good(
    scorer, pairs, tmp_path
):
    out = tmp_path / "f.db"
    collect(scorer, [pairs], out, OPTIONS)
    before = out.read_bytes()
    bad = tiny_sarm.write_jsonl(tmp_path / "bad.jsonl", [{"nothing": 1}])
    empty = tiny_sarm.write_jsonl(tmp_path / "empty.jsonl", [])
    for source in (tmp_path / "no such file", bad, empty):
        with pytest.raises((InputError, FileNotFoundError)):
            collect(scorer, [source], out, OPTIONS, overwrite=True)
        assert out.read_bytes() == before
    collect(scorer, [pairs], out, CollectOptions(contexts=1), overwrite=True)
    assert out.read_bytes() != before


def test_a_run_that_fails_leaves_another_ones_file(scorer, pairs, tmp_path, monkeypatch):
    """Both begin in an empty folder; the one that fails first must not take the file along."""
    out = tmp_path / "f.db"
    claim, others = collect_module._Run._claim, []

    def beside(run):
        claim(run)
        if not others:
            others.append(FeatureStore(out, "rw"))

    monkeypatch.setattr(collect_module._Run, "_claim", beside)
    monkeypatch.setattr(collect_module, "encoded_tails", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect(scorer, [pairs], out, OPTIONS)
    assert out.exists()
    others[0].close()
    with pytest.raises(ZeroDivisionError):
        collect(scorer, [pairs], out, OPTIONS, overwrite=True)
    assert not out.exists()


def test_a_model_without_a_tokenizer(scorer, pairs, tmp_path):
    import sarm

    bare = sarm.SARMScorer(scorer.model, None)
    with pytest.raises(InputError, match="tokenizer"):
        collect(bare, [pairs], tmp_path / "f.db", OPTIONS)
    assert not (tmp_path / "f.db").exists()
