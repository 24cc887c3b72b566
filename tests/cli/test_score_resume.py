"""`sarm score` killed at any point and started again: no row lost, none written twice."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import tiny_sarm

from sarm.data import BadRecords
from sarm.errors import InputError
from sarm.scorefile import score_file
from sarm.scorer import SARMScorer


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def scorer(trained):
    return SARMScorer.from_pretrained(trained / "rm")


@pytest.fixture(scope="module")
def whole(scorer, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    score_file(scorer, files / "in.jsonl", out, block=8)
    return out.read_bytes()


def kill_at(block):
    seen = [0]

    def progress(rows):
        seen[0] += 1
        if seen[0] == block + 1:  # the first call tells of resumed rows
            raise Killed

    return progress


@pytest.mark.parametrize("block", [1, 2, 5])
def test_killed_at_a_block_boundary(scorer, files, tmp_path, whole, block):
    out = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        score_file(scorer, files / "in.jsonl", out, block=8, progress=kill_at(block))
    assert not out.exists()
    told = []
    report = score_file(scorer, files / "in.jsonl", out, block=8, progress=told.append)
    assert (report.resumed, report.scored) == (8 * block, 40 - 8 * block)
    assert sum(told) == 40
    assert out.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("cut", [1, 2, 20, 60, 200])
def test_killed_inside_a_written_line(scorer, files, tmp_path, whole, cut):
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(Killed):
        score_file(scorer, files / "in.jsonl", out, block=8, progress=kill_at(2))
    with open(partial, "rb+") as file:
        file.truncate(partial.stat().st_size - cut)
    score_file(scorer, files / "in.jsonl", out, block=8)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(40))
    expected = [json.loads(line) for line in whole.splitlines()]
    # a block of other rows rounds differently in the last bits
    assert [r["reward"] for r in rows] == pytest.approx([r["reward"] for r in expected], abs=1e-4)


def test_a_process_killed_with_sigkill(trained, files, tmp_path, whole):
    """And the command line as a user starts it: `python -m sarm`."""
    out = tmp_path / "out.jsonl"
    child = (
        "import os, signal, sys, sarm.scorefile as s\n"
        "real, seen = s._score_block, []\n"
        "def score(*a):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*a)\n"
        "s._score_block = score\n"
        "from sarm.cli import main\n"
        "main()\n"
    )
    ask = ["score", str(files / "in.jsonl"), "-m", str(trained / "rm"), "-o", str(out), "--block",
           "8", "--threads", "1"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", child, *ask], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "out.jsonl.partial").read_bytes().count(b"\n") == 16
    done = subprocess.run(
        [sys.executable, "-m", "sarm", *ask], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "40 rows (16 from an earlier run)" in done.stdout
    assert out.read_bytes() == whole


def interrupted(scorer, source, out):
    with pytest.raises(Killed):
        score_file(scorer, source, out, block=8, progress=kill_at(2))


def test_another_model_is_refused(scorer, files, tmp_path):
    out = tmp_path / "out.jsonl"
    interrupted(scorer, files / "in.jsonl", out)
    with pytest.raises(InputError, match="unfinished run with another model"):
        score_file(scorer.steer({0: 2.0}), files / "in.jsonl", out)
    shorter = SARMScorer(scorer.model, scorer.tokenizer, max_length=100)
    with pytest.raises(InputError, match="unfinished run with another max_length"):
        score_file(shorter, files / "in.jsonl", out)
    assert score_file(scorer, files / "in.jsonl", out).resumed == 16


def test_another_input_of_the_same_size_is_refused(scorer, files, tmp_path):
    source, out = shutil.copy(files / "in.jsonl", tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    interrupted(scorer, source, out)
    source.write_text(source.read_text().replace("rain", "snow").replace("cold", "damp"))
    with pytest.raises(InputError, match="unfinished run with another input"):
        score_file(scorer, source, out)


def test_the_same_input_at_another_place_is_the_same(scorer, files, tmp_path):
    out = tmp_path / "out.jsonl"
    interrupted(scorer, files / "in.jsonl", out)
    moved = shutil.copy(files / "in.jsonl", tmp_path / "moved.jsonl")
    assert score_file(scorer, moved, out).resumed == 16


def test_an_output_that_exists_is_refused_or_replaced(scorer, files, tmp_path, whole):
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    with pytest.raises(InputError, match="exists already"):
        score_file(scorer, files / "in.jsonl", out)
    assert out.read_text() == "precious\n"
    with pytest.raises(Killed):
        score_file(scorer, files / "in.jsonl", out, overwrite=True, block=8, progress=kill_at(1))
    assert out.read_text() == "precious\n"
    score_file(scorer, files / "in.jsonl", out, overwrite=True, block=8)
    assert out.read_bytes() == whole


def test_bad_rows_are_counted_the_same_with_and_without_an_interruption(scorer, tmp_path):
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    lines = [json.dumps(talk)] * 12
    lines[1], lines[4], lines[9] = "{", '{"messages": []}', '{"messages": []}'
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines) + "\n")
    reports = []
    for name, block in (("a", 100), ("b", 3)):
        out = tmp_path / name
        if block == 3:
            with pytest.raises(Killed):
                score_file(scorer, source, out, bad=BadRecords(skip=True), block=3,
                           progress=kill_at(2))  # fmt: skip
        bad = BadRecords(skip=True)
        report = score_file(scorer, source, out, bad=bad, block=block)
        rows = [json.loads(line)["row"] for line in out.read_text().splitlines()]
        reports.append((rows, report.bad, report.scored + report.resumed))
        assert bad.first is not None
    assert reports[0] == reports[1] == ([0, 2, 3, 5, 6, 7, 8, 10, 11], 3, 9)


def test_truncated_rows_of_the_earlier_run_are_counted(scorer, files, tmp_path):
    short = SARMScorer(scorer.model, scorer.tokenizer, max_length=30)
    straight = score_file(short, files / "in.jsonl", tmp_path / "a")
    interrupted(short, files / "in.jsonl", tmp_path / "b")
    assert score_file(short, files / "in.jsonl", tmp_path / "b").truncated == straight.truncated > 0


def test_an_empty_input_gives_an_empty_output(scorer, tmp_path):
    source = tiny_sarm.write_jsonl(tmp_path / "in.jsonl", [])
    report = score_file(scorer, source, tmp_path / "out.jsonl")
    assert (report.scored, report.resumed) == (0, 0)
    assert os.path.getsize(tmp_path / "out.jsonl") == 0
