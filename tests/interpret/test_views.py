"""Pages and terminal views: what users and models wrote is shown, never obeyed."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from sarm.features.store import Context, Feature, Label
from sarm.interpret.attribution import compare, named
from sarm.interpret.html import comparison_page, explanation_page, feature_page, trace_page
from sarm.interpret.terminal import coloured, comparison_table, explanation_table, trace_text
from sarm.interpret.trace import trace

EVIL = "</script><script>alert(1)</script><img src=//evil.example/x onerror=alert(2)>\"'&]]>-->"


class Elements(HTMLParser):
    """Tags with attributes, and the text of each script and style."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.scripts.append([tag, ""])

    def handle_data(self, data):
        if self.cdata_elem is not None:  # within a script or a style
            self.scripts[-1][1] += data
        self.text.append(data)


@pytest.fixture(scope="module")
def pages(explained, talk):
    scorer = explained()
    turns = talk("q", "cat " + EVIL)
    found = trace(scorer, turns, top=3)
    names = {c.feature: EVIL for c in found.explanation.contributions}
    found = trace(scorer, turns, top=3, names=names)
    histogram = {"edges": [1.0, 2.0], "counts": [3], "negative": 0}
    feature = Feature(3, 3, 0.5, 1.0, 1.5, 0.1, 0.2, None, None, None, None, 0.1, histogram)
    context = Context(1, 3, "top", 1.5, 9, ["a ", EVIL, "\n"], [0.0, -0.5, 1.5], "file<b>:1")
    return {
        "trace": trace_page(found),
        "explanation": explanation_page(named(scorer.explain(turns), names)),
        "comparison": comparison_page(compare(scorer, turns, talk("q", "no"), 5, names)),
        "feature": feature_page(feature, [Label(3, EVIL, EVIL, EVIL)], [context]),
    }


@pytest.mark.parametrize("name", ["trace", "explanation", "comparison", "feature"])
def test_markup_of_others_is_text_and_nothing_is_requested(pages, name):
    page = pages[name]
    found = Elements(page)
    tags = [tag for tag, _ in found.tags]
    assert tags.count("script") == 2  # the data and our own
    assert not {"img", "b", "link", "iframe", "object", "base"} & set(tags)
    for _, attributes in found.tags:
        assert not {"src", "href", "style", "action"} & set(attributes)
        assert not [a for a in attributes if a.startswith("on")]
    assert EVIL in "".join(found.text)
    assert "http" not in re.sub(r'http-equiv="', "", page)
    assert "url(" not in page
    assert "@import" not in page


@pytest.mark.parametrize("name", ["trace", "feature"])
def test_the_policy_allows_this_script_and_style_only(pages, name):
    found = Elements(pages[name])
    (policy,) = [a["content"] for tag, a in found.tags if a.get("http-equiv")]
    assert "default-src 'none'" in policy
    own = [(tag, text) for tag, text in found.scripts if not text.lstrip().startswith("[")]
    assert [tag for tag, _ in own] == ["style", "script"]
    for tag, text in own:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("name", ["trace", "feature"])
def test_every_token_can_be_reached_and_has_its_values(pages, name):
    page = pages[name]
    found = Elements(page)
    (data,) = [text for tag, text in found.scripts if text.lstrip().startswith("[")]
    strips = json.loads(data)
    spans = [a for tag, a in found.tags if tag == "span"]
    assert all(len(s["values"]) == len(spans) for strip in strips for s in strip)
    assert [a["tabindex"] for a in spans] == ["0"] + ["-1"] * (len(spans) - 1)
    assert ("html", {"lang": "en"}) in found.tags
    assert [a for tag, a in found.tags if a.get("aria-live") == "polite"]
    radios = [a for tag, a in found.tags if tag == "input"]
    assert len(radios) == (4 if name == "trace" else 0)


def printed(*parts):
    console = Console(width=200, force_terminal=True, color_system="truecolor", record=True)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()


def test_terminal_views_show_escapes_and_markup_literally(explained, talk):
    scorer = explained()
    evil = "[bold]x[/] \x1b[2J\x1b]0;t\x07 \u202e"
    turns = talk("q", "cat " + evil)
    explanation = scorer.explain(turns)
    names = {c.feature: evil for c in explanation.contributions}
    shown = printed(
        explanation_table(named(explanation, names)),
        comparison_table(compare(scorer, turns, talk("q", "no"), 5, names)),
        trace_text(trace(scorer, turns, 3, names=names)),
        coloured([evil, "a"], [1.0, -0.5]),
    )
    assert "[bold]x[/]" in shown
    assert "\\u001b" in shown
    assert "\x1b[2J" not in shown
    assert "\x1b]0" not in shown
    assert "\x07" not in shown
    assert "\u202e" not in shown
