"""The pages that `sarm explain --html` writes, opened as files in a browser."""

import page_actions
import pytest

from sarm.interpret.html import explanation_page, feature_page, trace_page
from sarm.interpret.trace import trace

MARKUP = "<img src=x onerror=\"document.title='pwned'\">"
TALK = [
    {"role": "user", "content": "question 1 the cat"},
    {"role": "assistant", "content": f"on a mat {MARKUP}"},
]


@pytest.fixture
def written(browser, tmp_path):
    """written(html, scheme) -> the page, opened from a file; at the end: no error, no request."""
    pages = []

    def write(html, scheme="light"):
        path = tmp_path / "page.html"
        path.write_text(html, "utf-8")
        page = browser.new_context(color_scheme=scheme).new_page()
        seen, problems = [], []
        page.on("request", lambda request: seen.append(request.url))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        pages.append((page, path, seen, problems))
        return page

    yield write
    for page, path, seen, problems in pages:
        assert seen == [path.as_uri()]
        assert problems == []
        page.context.close()


def test_tokens_are_coloured_and_read_by_keyboard(written, page_scorer):
    found = trace(page_scorer, TALK, 3, names=dict.fromkeys(range(64), MARKUP))
    page = written(trace_page(found))
    assert "".join(page.locator(".tokens span").all_inner_texts()) == TALK[1]["content"]
    assert "pwned" not in page.title()
    colours = "s => s.map(x => x.style.backgroundColor)"
    by_reward = page.eval_on_selector_all(".tokens span", colours)
    assert all(by_reward)
    page.locator("input[type=radio]").nth(1).check()
    assert page.eval_on_selector_all(".tokens span", colours) != by_reward
    page.locator(".tokens span").first.focus()
    page.keyboard.press("ArrowRight")
    said = page.inner_text("output")
    feature = found.features[0]
    assert said.startswith(f'token 2 of {len(found.tokens)}, "{found.tokens[1]}": ')
    for value in (feature.activations[1], found.rewards[1]):
        assert f"{abs(value):.3f}"[:-1] in said
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.tabIndex") == 0
    assert page.locator(".tokens span[tabindex='0']").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_rules_of_accessibility(written, page_scorer, views, scheme):
    (strongest,) = (f.id for f in views.store.features("contribution", 1))
    store = views.store
    feature = feature_page(
        store.feature(strongest), store.labels(strongest), store.contexts(strongest)
    )
    explanation = page_scorer.explain(TALK, 3)
    for html in (feature, explanation_page(explanation), trace_page(trace(page_scorer, TALK, 3))):
        page = written(html, scheme)
        answer = page_actions.audit(page)
        assert answer["texts"] > 10
        assert answer["found"] == []
