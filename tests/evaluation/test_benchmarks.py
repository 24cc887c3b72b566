"""Benchmark files: what is read from them, and what is refused."""

import json

import pytest
import tiny_sarm

from sarm.data import BadRecords
from sarm.errors import InputError
from sarm.evaluation import benchmarks

RB2 = {"id": "1", "prompt": "q", "chosen": ["a"], "rejected": ["b", "c", "d"], "num_correct": 1,
       "num_incorrect": 3, "subset": "Safety"}  # fmt: skip
RMB = {"id": "1", "prompt": "q", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}


def rm_bench_file(path, rows):
    path.write_text(json.dumps(rows), "utf-8")
    return path


def test_reward_bench_2(tmp_path):
    path = tiny_sarm.write_jsonl(tmp_path / "safety.jsonl", [RB2, {**RB2, "prompt": "r"}])
    made = benchmarks.reward_bench_2(path)
    assert made.name == "RewardBench 2 safety"
    item = made.items[0]
    assert item.n_chosen == 1
    assert [c[-1]["content"] for c in item.conversations] == ["a", "b", "c", "d"]
    assert all(c[0] == {"role": "user", "content": "q"} for c in item.conversations)
    assert [i.group for i in made.items] == ["q", "r"]


def test_rm_bench(tmp_path):
    made = benchmarks.rm_bench(rm_bench_file(tmp_path / "chat_filtered.json", [RMB]))
    assert made.name == "RM-Bench chat"
    assert [c[-1]["content"] for c in made.items[0].conversations] == list("abcdef")
    assert made.items[0].n_chosen == 3


def test_preferences(tmp_path):
    path = tiny_sarm.write_jsonl(tmp_path / "valid.v2.jsonl", tiny_sarm.make_pairs(3))
    made = benchmarks.preferences(path)
    assert made.name == "valid"
    assert len({i.group for i in made.items}) == 3
    assert made.items[0].conversations[0][-1]["content"].endswith("thanks")


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("reader", ["reward_bench_2", "rm_bench"])
def test_a_missing_field_names_its_row(tmp_path, reader, field):
    row = {k: v for k, v in (RB2 if reader == "reward_bench_2" else RMB).items() if k != field}
    if reader == "reward_bench_2":
        path, where = tiny_sarm.write_jsonl(tmp_path / "b.jsonl", [RB2, row]), "b.jsonl:2"
    else:
        path, where = rm_bench_file(tmp_path / "b.json", [RMB, row]), r"b.json\[1\]"
    with pytest.raises(InputError, match=f"{where}: field '{field}' is missing"):
        getattr(benchmarks, reader)(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"subset": "Ties"}, "Ties subset has rules of its own"),
        ({"chosen": ["a", "b"]}, "RewardBench 2 has 1 chosen, got 2"),
        ({"rejected": ["b", "c"]}, "num_incorrect is 3 but there are 2"),
        ({"chosen": []}, "non-empty lists"),
        ({"rejected": {}}, "non-empty lists"),
        ({"rejected": ["b", 4, "c"]}, "must be strings"),
        ({"prompt": ["q"]}, "must be strings"),
    ],
)
def test_malformed_reward_bench_2_rows(tmp_path, change, says):
    path = tiny_sarm.write_jsonl(tmp_path / "b.jsonl", [RB2, {**RB2, **change}])
    with pytest.raises(InputError, match=rf"b\.jsonl:2: .*{says}"):
        benchmarks.reward_bench_2(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"chosen": ["a", "b"]}, "3 chosen and 3 rejected, got 2 and 3"),
     ({"rejected": list("defg")}, "3 chosen and 3 rejected, got 3 and 4"),
     ({"chosen": "abc"}, "got 1 and 3")],
)  # fmt: skip
def test_malformed_rm_bench_rows(tmp_path, change, says):
    path = rm_bench_file(tmp_path / "b.json", [{**RMB, **change}])
    with pytest.raises(InputError, match=says):
        benchmarks.rm_bench(path)


@pytest.mark.parametrize("message", [{"role": "assistant"}, {"content": "x"}])
def test_preference_messages_without_role_or_content_are_refused(tmp_path, message):
    row = tiny_sarm.make_pairs(1)[0]
    path = tiny_sarm.write_jsonl(tmp_path / "p.jsonl", [row, {**row, "chosen": [message]}])
    with pytest.raises(InputError, match=r"p\.jsonl:2"):
        benchmarks.preferences(path)
    bad = BadRecords(skip=True)
    assert len(benchmarks.preferences(path, bad).items) == 1
    assert bad.count == 1


@pytest.mark.parametrize("reader", ["preferences", "reward_bench_2"])
def test_an_empty_file_is_refused(tmp_path, reader):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match=r"empty\.jsonl: no items"):
        getattr(benchmarks, reader)(tmp_path / "empty.jsonl")
