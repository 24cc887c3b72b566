"""`sarm features` and what `sarm explain` does with its database, as a user types them."""

import json

import pytest

from sarm.features import FeatureStore


@pytest.fixture(scope="module")
def database(trained, files, tmp_path_factory):
    from sarm import cli

    out = tmp_path_factory.mktemp("features") / "f.db"
    command = ["features", "collect", files / "valid.jsonl", "-m", trained / "rm", "-o", out]
    command += ["--contexts", 4, "--window", 16]
    assert cli.app([str(c) for c in command], standalone_mode=False) in (0, None)
    with FeatureStore(out, "rw") as store:
        for feature in store.features("id"):
            store.add_label(feature.id, "test", f"label <{feature.id}>")
    return out


def test_show_search_and_page(sarm, database, tmp_path):
    listed = sarm("features", "show", database, "--limit", 3)
    assert listed.code == 0
    assert "contribution" in listed.out
    with FeatureStore(database) as store:
        (best,) = store.features("contribution", 1)
    one = sarm("features", "show", database, best.id, "--limit", 2)
    assert f"label <{best.id}>" in one.out
    assert "valid.jsonl:" in one.out
    page = tmp_path / "p.html"
    assert sarm("features", "show", database, best.id, "--html", page).code == 0
    assert f"label &lt;{best.id}&gt;" in page.read_text("utf-8")
    page = tmp_path / "[red]" / "a[/b].html"  # names that rich would take for its markup
    written = sarm("features", "show", database, best.id, "--html", page)
    assert (written.code, written.out.strip()) == (0, f"{page}: written")
    found = sarm("features", "search", database, f"label {best.id}")
    assert str(best.id) in found.out


def test_explain_with_labels_traces_and_pages(sarm, trained, database, files, tmp_path):
    ask = ["explain", "-m", trained / "rm", "--prompt", "q", "--response", "the cat sat"]
    done = sarm(*ask, "--features", database, "--json")
    labels = {c["feature"]: c["label"] for c in json.loads(done.out)["contributions"]}
    assert all(label in (None, f"label <{f}>") for f, label in labels.items())
    assert any(labels.values())
    traced = json.loads(sarm(*ask, "--per-token", "--json").out)
    assert len(traced["tokens"]) == len(traced["rewards"])
    assert traced["rewards"][-1] == pytest.approx(traced["explanation"]["reward"], abs=1e-5)
    assert sarm(*ask, "--per-token", "--reading", "read").code == 0
    page = tmp_path / "p.html"
    assert sarm(*ask, "--per-token", "--html", page, "--features", database).code == 0
    assert "label &lt;" in page.read_text("utf-8")
    margin = sarm("explain", files / "valid.jsonl", "-m", trained / "rm", "--json")
    assert {"margin", "differences"} <= json.loads(margin.out).keys()
    out = tmp_path / "all.jsonl"
    done = sarm("explain", files / "valid.jsonl", "-m", trained / "rm", "--all", "-o", out)
    assert "20 rows" in done.out
    assert len(out.read_text().splitlines()) == 20


def test_diff_and_exports(sarm, trained, database, files, tmp_path):
    same = json.loads(sarm("features", "diff", database, database, "--json").out)
    assert all(d["z"] == 0 and d["shift"] == 0 for d in same)
    both = ["--model-a", trained / "rm", "--model-b", trained / "rm"]
    matched = json.loads(sarm("features", "diff", database, database, *both, "--json").out)
    assert all(d["feature"] == d["partner"] for d in matched)
    assert sarm("features", "diff", database, database, *both).code == 0
    out = tmp_path / "np"
    assert sarm("features", "export", database, "--format", "neuronpedia", "-o", out).code == 0
    source = ["--source", files / "valid.jsonl", "-m", trained / "rm", "--responses", 6]
    out = tmp_path / "delphi"
    assert sarm("features", "export", "--format", "delphi", "-o", out, *source).code == 0
    assert list(out.glob("*/*.safetensors"))


def test_one_line_each(refused, trained, database, files, tmp_path):
    model = ["-m", trained / "rm"]
    ask = ["explain", *model, "--prompt", "q", "--response", "a"]
    text = files / "text.jsonl"
    with FeatureStore(tmp_path / "other.db", "rw") as store:
        store.set_meta(features="of another", head="x")
    assert "another model" in refused(*ask, "--features", tmp_path / "other.db")
    assert "no such feature database" in refused(*ask, "--features", tmp_path / "none.db")
    assert "damaged" in refused("features", "show", text)
    assert "no feature 9999" in refused("features", "show", database, 9999)
    assert "order must be one of" in refused("features", "show", database, "--order", "x")
    assert "exists already" in refused(
        "features", "collect", files / "valid.jsonl", *model, "-o", database
    )
    assert "--format must be" in refused(
        "features", "export", database, "--format", "x", "-o", tmp_path / "x"
    )
    assert "needs -m and --source" in refused(
        "features", "export", "--format", "delphi", "-o", tmp_path / "x"
    )
    assert "--all needs a file and -o" in refused("explain", *model, "--all")
    assert "is of one response" in refused("explain", files / "valid.jsonl", *model, "--per-token")
    assert "reading must be one of" in refused(*ask, "--per-token", "--reading", "x")
    assert "neither" in refused("features", "diff", database, database, "--model-a", trained / "rm")
