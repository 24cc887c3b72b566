"""Reading what users have, and saying which line is wrong."""

import gzip
import json
import random
from pathlib import Path

import pytest

from sarm import InputError
from sarm.data import BadRecords, read_preferences, read_records, read_texts

DATA = Path(__file__).parents[2] / "shared" / "data"
ROWS = [{"text": "first"}, {"text": "zweite Zeile, ü"}, {"text": "third", "id": 7}]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path, rows):
    name = path.name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines(rows).encode()))
    elif name.endswith(".jsonl"):
        path.write_text(lines(rows), "utf-8")
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows), "utf-8")
    elif name.endswith(".txt"):
        path.write_text("\n\n".join(row["text"] for row in rows), "utf-8")
    else:
        pa = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.txt"])
def test_every_format(name, tmp_path):
    path = write(tmp_path / name, ROWS)
    got = list(read_texts(path))
    assert [text.strip() for _, text in got] == [row["text"] for row in ROWS]
    places = {
        "a.json": ["[0]", "[1]", "[2]"],
        "a.parquet": ["[0]", "[1]", "[2]"],
        "a.txt": [":1", ":3", ":5"],
    }.get(name, [":1", ":2", ":3"])
    assert [where for where, _ in got] == [f"{path}{place}" for place in places]
    assert list(read_texts(str(path))) == got


def test_a_directory_in_order(tmp_path):
    write(tmp_path / "b.jsonl", ROWS[:1])
    write(tmp_path / "a.txt", ROWS[1:2])
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "c.jsonl.gz", ROWS[2:])
    (tmp_path / "notes.md").write_text("not read")
    texts = [text for _, text in read_texts(tmp_path)]
    assert texts == ["zweite Zeile, ü", "first", "third"]


def test_paragraphs_of_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\none\ntwo\n\n  \n\nthree\r\n", "utf-8")
    assert list(read_texts(path)) == [(f"{path}:3", "one\ntwo\n"), (f"{path}:8", "three\r\n")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_byte_order_mark_is_not_text(name, tmp_path):
    path = write(tmp_path / name, ROWS[:1])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [text for _, text in read_texts(path)] == ["first"]


def test_blank_lines_and_blank_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n  \n{"text": " "}\n{"text": "x"}')
    assert list(read_texts(path)) == [(f"{path}:4", "x")]


def test_another_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n')
    assert list(read_texts(path, key="body")) == [(f"{path}:1", "x")]
    with pytest.raises(InputError, match=r"a\.jsonl:1: expected a string field 'text', got body:"):
        list(read_texts(path))


def test_it_streams(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\nbroken\n')
    records = read_records(path)
    assert next(records).fields == {"text": "x"}


# ---- bad input -----------------------------------------------------------------------------

BAD_LINES = {
    "{": "malformed JSON",
    '{"text": "x"': "malformed JSON",
    "[1, 2]": "expected an object, got list",
    '"text"': "expected an object, got str",
    "null": "expected an object, got NoneType",
    "[" * 100_000: "malformed JSON",
    '{"n": ' + "1" * 5000 + "}": "malformed JSON",
    b'{"text": "\xff"}': "malformed JSON",
}


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(("line", "text"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_malformed_lines(line, text, gz, tmp_path):
    line = line if isinstance(line, bytes) else line.encode()
    content = b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n' + line + b"\n"
    path = tmp_path / ("a.jsonl.gz" if gz else "a.jsonl")
    path.write_bytes(gzip.compress(content) if gz else content)
    with pytest.raises(InputError) as caught:
        list(read_texts(path))
    assert str(caught.value).startswith(f"{path}:3: {text}")
    assert "\n" not in str(caught.value)
    bad = BadRecords(skip=True)
    assert [t for _, t in read_texts(path, bad)] == ["a", "b"]
    assert bad.count == 2
    assert bad.first.startswith(f"{path}:3: {text}")


def test_not_utf8_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n\n\xff\xfe bad\n\nalso fine\n")
    with pytest.raises(InputError, match=r"a\.txt:3: not UTF-8"):
        list(read_texts(path))
    bad = BadRecords(skip=True)
    assert [t.strip() for _, t in read_texts(path, bad)] == ["fine", "also fine"]
    assert bad.count == 1


def test_truncated_gzip(tmp_path):
    rng = random.Random(0)
    rows = [{"text": str(rng.random())} for _ in range(2000)]
    path = write(tmp_path / "a.jsonl.gz", rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    got = []
    texts = (text for _, text in read_texts(path, BadRecords(skip=True)))
    with pytest.raises(InputError, match=r"a\.jsonl\.gz:\d+: cannot read on"):
        got.extend(texts)  # half a file is not a bad row, which might be skipped
    assert got == [row["text"] for row in rows[: len(got)]]
    assert len(got) > 100


@pytest.mark.parametrize("at", [0, 1, 12, 200, 5000, -6])
def test_damaged_gzip(at, tmp_path):
    rng = random.Random(0)
    path = write(tmp_path / "a.jsonl.gz", [{"text": str(rng.random())} for _ in range(2000)])
    content = bytearray(path.read_bytes())
    for i in range(at, at + 3):
        content[i] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"a\.jsonl\.gz:\d+: "):
        list(read_texts(path))


@pytest.mark.parametrize(
    ("content", "text"),
    [("", "malformed JSON"), ("{", "malformed JSON"), ('{"a": 1}', "expected a list of objects"),
     ("[1]", "a.json[0]: expected an object, got int")],
)  # fmt: skip
def test_bad_json_file(content, text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        list(read_records(path))
    assert text in str(caught.value)
    assert str(path) in str(caught.value)


def test_bad_rows_of_a_json_file_are_skipped(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, 3, {"text": "b"}]')
    bad = BadRecords(skip=True)
    assert [t for _, t in read_texts(path, bad)] == ["a", "b"]
    assert (bad.count, bad.first) == (1, f"{path}[1]: expected an object, got int")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
def test_bad_parquet(content, tmp_path):
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet: not a readable parquet file"):
        list(read_records(path))


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        list(read_records(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no file with a suffix of \.txt, \.jsonl"):
        list(read_records(tmp_path / "empty"))
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(InputError, match=r"a\.csv: expected a suffix of \.txt"):
        list(read_records(tmp_path / "a.csv"))


def test_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="hub: needs datasets")
    asked = []

    def load(name, split, streaming):
        asked.append((name, split, streaming))
        yield from ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    got = [r.where for r in read_records("hub:owner/name:test[:3]")]
    assert got == ["owner/name:test[:3][0]", "owner/name:test[:3][1]", "owner/name:test[:3][2]"]
    list(read_records("hub:owner/name"))
    assert asked == [("owner/name", "test[:3]", True), ("owner/name", "train", True)]

    def fail(*args, **kwargs):
        raise RuntimeError("")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"hub:owner/name: cannot load \(RuntimeError\)"):
        list(read_records("hub:owner/name"))


# ---- preferences ---------------------------------------------------------------------------


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


FORMATS = {
    "conversational": {"prompt": [user("q")], "chosen": [answer("a")], "rejected": [answer("b")]},
    "plain": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "plain prompt, message answers": {
        "prompt": "q", "chosen": [answer("a")], "rejected": [answer("b")]},
    "message prompt, plain answers": {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
    "implicit": {"chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]},
    "prompt repeated": {
        "prompt": "q", "chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]},
}  # fmt: skip


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS.keys())
def test_preference_formats(row, tmp_path):
    path = write(tmp_path / "p.jsonl", [row | {"source": "x", "margin": 2}])
    (pair,) = read_preferences(path)
    assert pair.chosen == [user("q"), answer("a")]
    assert pair.rejected == [user("q"), answer("b")]
    assert pair.where == f"{path}:1"
    assert pair.extra == {"source": "x", "margin": 2}


def pairs(tmp_path, *rows):
    return list(read_preferences(write(tmp_path / "p.jsonl", rows)))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "ends"),
    [("The sky is blue.", "The sky is black.", "The sky is ", ("blue.", "black.")),
     ("yes", "no", None, ("yes", "no")),
     ("a b", "a b c", "a ", ("b", "b c")),
     ("one two", "one twofold", "one ", ("two", "twofold"))],
)  # fmt: skip
def test_implicit_plain_prompt(chosen, rejected, prompt, ends, tmp_path):
    (pair,) = pairs(tmp_path, {"chosen": chosen, "rejected": rejected})
    head = [] if prompt is None else [user(prompt)]
    assert pair.chosen == [*head, answer(ends[0])]
    assert pair.rejected == [*head, answer(ends[1])]


def test_multi_turn_prompts_and_their_keys(tmp_path):
    prompt = [user("a"), answer("b"), user("c")]
    one, two, three = pairs(
        tmp_path,
        {"prompt": prompt, "chosen": [answer("d")], "rejected": [answer("e")]},
        {"prompt": prompt, "chosen": [answer("f")], "rejected": [answer("d")]},
        {"prompt": prompt[:1], "chosen": [answer("d")], "rejected": [answer("e")]},
    )
    assert one.chosen == [*prompt, answer("d")]
    assert one.prompt_key == two.prompt_key != three.prompt_key


@pytest.mark.parametrize(
    ("row", "text"),
    [({"prompt": "q", "chosen": "a"}, "field 'rejected' is missing, got prompt: str, chosen: str"),
     ({}, "field 'chosen' is missing, got nothing"),
     ({"chosen": "a", "rejected": None}, "rejected must be a string or a list of messages"),
     ({"chosen": "a", "rejected": ["b"]}, "chosen and rejected must both be strings or both lists"),
     ({"chosen": ["a"], "rejected": ["b"]}, "chosen must be a string or a list of messages"),
     ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt must be a string or a list"),
     ({"chosen": [], "rejected": [answer("b")]}, "empty conversation"),
     ({"chosen": [{"content": "x"}], "rejected": [answer("b")]},
      "chosen, message 0: expected role and content, got content"),
     ({"prompt": [{}], "chosen": [answer("a")], "rejected": [answer("b")]},
      "prompt, message 0: expected role and content, got nothing")],
)  # fmt: skip
def test_bad_preferences(row, text, tmp_path):
    path = write(tmp_path / "p.jsonl", [FORMATS["plain"], row, FORMATS["plain"]])
    with pytest.raises(InputError) as caught:
        list(read_preferences(path))
    assert str(caught.value).startswith(f"{path}:2: {text}")
    bad = BadRecords(skip=True)
    assert len(list(read_preferences(path, bad))) == 2
    assert bad.count == 1


# ---- the project's real data ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"), [("preferences_train.jsonl.gz", 8674), ("preferences_valid.jsonl.gz", 1237)]
)
def test_real_preferences(name, count):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not on this machine")
    found = list(read_preferences(DATA / name))
    assert len(found) == count
    assert all(p.chosen[-1]["role"] == p.rejected[-1]["role"] == "assistant" for p in found)
    assert all(p.chosen[:-1] == p.rejected[:-1] for p in found)
    assert {len(p.prompt_key) > 2 for p in found} == {True}
    assert all("source" in p.extra for p in found)


def test_real_texts():
    path = DATA / "text_chat_answers.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    texts = [text for _, text in read_texts(path)]
    assert 6000 < len(texts) <= 6223
    assert 9e6 < sum(map(len, texts)) < 12e6
