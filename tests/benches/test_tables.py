"""Numbers reach the documentation by the command only, and only into their own place."""

import compare
import pytest
import run
import tables
from suite import BenchError, Ratio, Row

PAGE = """# Title
Words stay.
<!-- bench: single -->
old
<!-- /bench -->
between
<!-- bench: other -->
kept
<!-- /bench -->
"""
HEADER = {"device": "cpu (X)", "threads": "2", "commit": "abc"}


def rows():
    published = Row("single", "400 tokens", "", "published bf16", 200.0, 190.0, 230.0)
    ours = Row("single", "400 tokens", "", "sarm int8", 50.0, 49.0, 51.0)
    ours.ratios = {"published bf16": Ratio(0.25, 0.2, 0.5)}
    ours.accuracy = {"tokens_per_s": 8000.4, "unknown": 0.123456}
    missing = Row("single", "400 tokens", "", "sarm fp8", note="not supported")
    return [published, ours, missing]


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_a_table_goes_into_its_place(page):
    assert tables.fill(page, [(HEADER, rows())]) == ["single"]
    lines = page.read_text().splitlines()
    assert lines[:3] == ["# Title", "Words stay.", "<!-- bench: single -->"]
    assert lines[3] == "400 tokens"
    assert "|  | ms (p20-p80) | tokens/s | unknown | times published bf16 |" in lines
    assert "| published bf16 | 200 (190-230) |  |  |  |" in lines
    assert "| sarm int8 | 50.0 (49.0-51.0) | 8,000 | 0.123 | 4.00 (2.00-5.00) |" in lines
    assert "| sarm fp8 | not supported |  |  |  |" in lines
    assert "*device cpu (X), threads 2, commit abc*" in lines
    assert "old" not in lines
    assert lines[-4:] == ["between", "<!-- bench: other -->", "kept", "<!-- /bench -->"]
    first = page.read_text()
    tables.fill(page, [(HEADER, rows())])
    assert page.read_text() == first


def test_from_a_kept_result(page, tmp_path, capsys):
    file = tmp_path / "run.json"
    compare.write(file, "prefix", HEADER, rows())
    assert tables.main([str(page), str(file)]) == 0
    assert "8,000" in page.read_text()


def test_a_page_without_the_place(page, tmp_path, capsys):
    other = [Row("score", "x", "", "sarm", 1.0, 1.0, 1.0)]
    with pytest.raises(BenchError, match="no place for score; its places: single, other"):
        tables.fill(page, [(HEADER, other)])
    assert page.read_text() == PAGE
    assert tables.main([str(page), str(tmp_path / "no.json")]) == 2
    assert "no.json: No such file" in capsys.readouterr().err


def test_run_fills_the_page(page, tmp_path):
    page.write_text("<!-- bench: gather_dot -->\n<!-- /bench -->\n")
    arguments = ["--device", "cpu", "--shape", "16,16,64,4", "--runs", "1", "--no-memory"]
    arguments += ["--only", "gather_dot/sarm", "--dtype", "fp32", "--markdown", str(page)]
    assert run.main(arguments) == 0
    assert "| sarm |" in page.read_text()


def test_the_documentation_has_a_place_for_every_case():
    import pathlib

    text = (pathlib.Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    places = {case for case, _ in tables.PLACE.findall(text)}
    cases = {"score", "best-of-n", "single", "agreement", "llama8b", "64 clients", "overload x10"}
    assert places == cases | {
        "train-sae, sentence",
        "train-sae, token",
        "train-sae, processes",
    }


def test_points_stand_with_their_interval():
    row = Row("agreement", "", "", "sarm int8")
    row.accuracy = {"points": 1.213, "points_low": -0.04, "points_high": 2.5}
    assert tables.cells(row) == {"": "sarm int8", "points": "+1.21 [-0.0, +2.5]"}
