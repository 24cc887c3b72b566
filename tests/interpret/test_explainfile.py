"""A file of explanations: sums on every line, preferences too, resumed like scores."""

import json

import pytest
import tiny_sarm

from sarm.data import BadRecords
from sarm.errors import InputError
from sarm.interpret.explainfile import explain_file


@pytest.fixture
def source(tmp_path):
    """Preferences and conversations mixed."""
    rows = tiny_sarm.make_pairs(6)
    talks = [{"messages": [*r["prompt"], *r["chosen"]], "id": i} for i, r in enumerate(rows)]
    return tiny_sarm.write_jsonl(tmp_path / "in.jsonl", [*rows, *talks])


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_every_line_sums_and_agrees_with_explain(explained, source, tmp_path):
    scorer = explained(quantization="int8")
    out = tmp_path / "out.jsonl"
    report = explain_file(scorer, source, out, top=2, names={5: "five"}, block=5)
    assert (report.scored, report.bad) == (12, 0)
    found = lines(out)
    assert [x["row"] for x in found] == list(range(12))
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for line in found[:6]:
        total = line["rest"] + sum(d["value"] for d in line["differences"])
        assert total == pytest.approx(line["margin"], abs=1e-5)
        assert line["margin"] == pytest.approx(line["chosen"] - line["rejected"], abs=1e-9)
        assert line["id"] == f"pair-{line['row']}"
    for line, row in zip(found[6:], rows[6:], strict=True):
        total = line["rest"] + sum(c["value"] for c in line["contributions"])
        assert total == pytest.approx(line["reward"], abs=1e-5)
        alone = scorer.explain(row["messages"], 2)
        assert line["reward"] == alone.reward
        assert [c["feature"] for c in line["contributions"]] == [
            c.feature for c in alone.contributions
        ]
        assert line["n_rest"] == alone.n_rest
    labels = {c["label"] for line in found[6:] for c in line["contributions"]}
    assert labels <= {None, "five"}


def test_a_stopped_run_goes_on(explained, source, tmp_path):
    scorer = explained()
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    explain_file(scorer, source, whole, block=3)

    class Killed(BaseException):
        pass

    def stop(rows, seen=[]):  # noqa: B006
        seen.append(rows)
        if len(seen) == 3:
            raise Killed

    with pytest.raises(Killed):
        explain_file(scorer, source, out, block=3, progress=stop)
    with pytest.raises(InputError, match="another explanations"):
        explain_file(scorer, source, out, block=3, top=7)
    assert explain_file(scorer, source, out, block=3).resumed == 6
    assert out.read_bytes() == whole.read_bytes()


def test_bad_rows(explained, tmp_path):
    rows = [{"chosen": "a"}, {"prompt": "q", "response": "a"}, {"prompt": "q"}]
    source = tiny_sarm.write_jsonl(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    with pytest.raises(InputError, match=r"in\.jsonl:1: field 'rejected' is missing"):
        explain_file(explained(), source, out)
    assert not out.exists()
    bad = BadRecords(skip=True)
    assert explain_file(explained(), source, out, bad=bad).bad == 2
    assert [x["row"] for x in lines(out)] == [1]


def test_other_labels_are_another_run(explained, source, tmp_path):
    scorer, out = explained(), tmp_path / "out.jsonl"
    first = {f: f"a{f}" for f in range(64)}

    def stop(rows, seen=[]):  # noqa: B006
        seen.append(rows)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain_file(scorer, source, out, names=first, block=2, progress=stop)
    with pytest.raises(InputError, match="labels"):
        explain_file(scorer, source, out, names={f: f"b{f}" for f in range(64)}, block=2)
