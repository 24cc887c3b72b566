"""`sarm dashboard`: what it builds from its options, and one line for bad ones."""

import sys

import pytest
import tiny_sarm
from starlette.testclient import TestClient

from sarm import cli
from sarm.integrations import process


@pytest.fixture(scope="module")
def saved(page_scorer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    page_scorer.save_pretrained(folder)
    return folder


@pytest.fixture
def sarm(monkeypatch, capfd):
    """Run `sarm dashboard ARGS`; (exit code, stderr, what would have been served)."""

    def run(*args):
        served = []
        monkeypatch.setattr(process, "serve", lambda page, sock, say: served.append((page, sock)))
        monkeypatch.setattr(sys, "argv", ["sarm", "dashboard", *map(str, args), "--port", "0"])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        for _, sock in served:
            sock.close()
        return code, capfd.readouterr().err, [page for page, _ in served]

    return run


def test_everything_together(sarm, saved, page_database, page_pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("PAGE_TOKEN", "s3cret")
    args = ["--features", page_database, "--set", page_pairs, "--set", f"{page_pairs}#1/2"]
    args += ["--profiles", tmp_path / "profiles", "--cache", tmp_path / "states.sqlite"]
    code, err, (page,) = sarm("-m", saved, *args, "--token-env", "PAGE_TOKEN")
    assert code == 0, err
    client = TestClient(page.app, base_url="http://127.0.0.1")
    client.headers["authorization"] = "Bearer s3cret"
    about = client.get("/api/about").json()
    assert about["model"] == "tiny"
    assert about["database"]
    assert about["saves"]
    whole, half = (one["responses"] for one in about["sets"])
    assert 0 < half < whole == 40
    assert (tmp_path / "states.sqlite").stat().st_size > 0
    body = {"profile": {"features": [{"feature": 1, "multiply": 2}]}, "set": 1}
    assert client.post("/api/shift", json=body).status_code == 200


def test_bad_options_are_one_line(sarm, saved, tiny_scorer, page_database, page_pairs, tmp_path):
    other = tmp_path / "other"
    tiny_scorer(seed=1).save_pretrained(other)
    empty = tiny_sarm.write_jsonl(tmp_path / "empty.jsonl", [])
    for args, said in (
        (["-m", other, "--features", page_database], "collected with another model"),
        (["-m", saved, "--features", page_pairs], "not a feature database"),
        (["-m", saved, "--features", tmp_path / "none.db"], "no such feature database"),
        (["-m", saved, "--set", tmp_path / "none.jsonl"], "none.jsonl"),
        (["-m", saved, "--set", empty], "no items"),
        (["-m", saved, "--cache", tmp_path / "a.sqlite"], "there is none"),
        (["-m", saved, "--token-env", "NOT_SET_AT_ALL"], "is not set"),
        (["-m", tmp_path / "nowhere"], "nowhere"),
    ):
        code, err, served = sarm(*args)
        assert code == 2
        assert not served
        assert said in err
        assert err.count("\n") == 1, err
