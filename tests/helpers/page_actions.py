"""What people do on the page of `sarm dashboard`, and what is seen of it."""

import io
import re
from pathlib import Path

import numpy as np
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'sarm[test-page]'")
Image = pytest.importorskip("PIL.Image", reason="pip install 'sarm[test-page]'")


def ready(page):
    page.wait_for_selector("html[data-ready]")
    page.wait_for_selector("#list li")
    page.wait_for_selector("#chart svg.histogram")


def score(page, *responses):
    page.fill("#prompt", "question 1 the cat")
    for i, response in enumerate(responses, 1):
        page.fill(f"#answer-{i}", response)
    page.click("#score button[type=submit]")
    page.wait_for_selector("#results .reward")


def settled(page, act):
    """The answer of /api/shift to what `act` does, once it is shown."""
    with page.expect_response(lambda r: r.url.endswith("/api/shift")) as found:
        act()
    answer = found.value.json()
    sign = "−" if answer["shift"]["all"] < 0 else "\\+"
    moved = f"by {sign}{abs(answer['shift']['all']):.3f} sd"
    playwright.expect(page.locator("#shift-status")).to_have_text(re.compile(moved))
    return answer


def add_slider(page, feature):
    page.fill("#feature-number", str(feature))
    settled(page, lambda: page.keyboard.press("Enter"))
    page.wait_for_selector(f"#slider-{feature}")


def slide(page, value):
    page.locator("#sliders input").first.fill(str(value))


def pixels(locator):
    """(H, W, 3) of a screenshot."""
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB")).astype(int)


AUDIT = Path(__file__).with_name("page_audit.js").read_text("utf-8")


def audit(page):
    """{"found": violations of rules of accessibility, a line each, "texts": how many were seen}."""
    return page.evaluate(AUDIT.partition("\n() =>")[1] + AUDIT.partition("\n() =>")[2])
