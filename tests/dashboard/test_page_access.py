"""The page for everybody: names, keyboard, a phone, the dark, contrast."""

import itertools

import pytest
from page_actions import add_slider, audit, pixels, playwright, ready, score, settled


def names_of_controls(page):
    """(role, name) of all controls, as the browser tells a screen reader."""
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")
    roles = {"button", "textbox", "searchbox", "combobox", "slider", "link", "image", "img"}
    return [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree["nodes"]
        if not node["ignored"] and node["role"]["value"] in roles
    ]


def test_every_control_has_a_name(opened):
    page = opened()
    score(page, "on a mat thanks", "ugh no")
    page.locator("[data-tokens]").first.click()
    page.wait_for_selector(".tokens span")
    page.locator("#results .name").first.click()
    page.locator("#list button.item").first.click()
    page.wait_for_selector(".detail .tokens span")
    found = names_of_controls(page)
    assert {"button", "textbox", "slider", "combobox", "link"} <= {role for role, _ in found}
    assert [role for role, name in found if not name.strip()] == []
    headings = page.eval_on_selector_all("h1, h2, h3, h4", "s => s.map(x => +x.tagName[1])")
    assert headings[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))
    page.locator("#chart summary").click()  # the chart's numbers as text
    bars = page.locator("#chart rect").count()
    playwright.expect(page.locator("#chart tbody tr")).to_have_count(bars)


def test_the_keyboard_is_enough(opened):
    page = opened()
    order = []
    for _ in range(7):
        page.keyboard.press("Tab")
        look = (
            "(e, s = getComputedStyle(e)) => [e.id || e.innerText, s.outlineStyle, s.outlineWidth]"
        )
        order.append(page.evaluate(f"({look})(document.activeElement)"))
    assert [name for name, _, _ in order] == [
        *("Responses", "Steering", "Features", "prompt", "answer-1", "answer-2", "Score")
    ]
    assert all(style == "solid" and width == "3px" for _, style, width in order)
    add_slider(page, 5)
    page.focus("#slider-5")
    settled(page, lambda: page.keyboard.press("ArrowRight"))
    assert page.get_attribute("#slider-5", "aria-valuetext") == "times 1.05"
    settled(page, lambda: page.keyboard.press("Home"))
    assert page.get_attribute("#slider-5", "aria-valuetext") == "times -2.00"
    page.locator("#list button.item").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#list li:nth-child(2) .detail")


def test_a_phone_never_scrolls_sideways(opened):
    page = opened(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    score(page, "on a mat thanks", "x" * 300)
    page.locator("[data-tokens]").first.click()
    page.wait_for_selector(".tokens span")
    page.locator("#results .name").first.click()
    page.locator("#list button.item").first.click()
    page.wait_for_selector(".detail .tokens span")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    heights = page.eval_on_selector_all(
        "button, input, select", "s => s.filter(x => x.offsetParent).map(x => x.offsetHeight)"
    )
    assert min(heights) >= 24  # WCAG 2.2, target size


def test_it_is_dark_where_people_want_it(opened):
    light, dark = (
        pixels(opened(color_scheme=scheme).locator("header")).mean() for scheme in ("light", "dark")
    )
    assert light > 200
    assert dark < 80


def test_a_token_is_asked_for(opened):
    page = opened(token="s3cret")
    page.wait_for_selector("#login[open]")
    page.fill("#token", "wrong")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#login-status")).to_have_text("That is another token.")
    page.fill("#token", "s3cret")
    page.keyboard.press("Enter")
    ready(page)


FULL = {"laptop": (1280, 900), "phone": (390, 844)}


def everything_open(page):
    """Results, coloured tokens, a slider, the chart's table, a feature's detail, an error."""
    score(page, "on a mat thanks", "ugh no")
    page.locator("[data-tokens]").first.click()
    page.wait_for_selector(".tokens span")
    settled(page, page.locator("#results .name").first.click)
    page.locator("#chart summary").click()
    page.locator("#list button.item").first.click()
    page.wait_for_selector(".detail .tokens span")
    page.fill("#feature-number", "99")
    page.locator("#feature-number").press("Enter")
    page.wait_for_selector("#shift-status.bad")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", FULL)
def test_rules_of_accessibility(opened, screen, scheme):
    width, height = FULL[screen]
    page = opened(viewport={"width": width, "height": height}, color_scheme=scheme)
    everything_open(page)
    answer = audit(page)
    assert answer["texts"] > 100
    assert answer["found"] == []


def test_the_audit_finds_what_is_wrong(opened):
    page = opened()
    page.evaluate(
        """() => {
        document.querySelector("h2").style.color = "#aaa";
        document.querySelector("#add").id = "prompt";
        document.querySelector("#query").tabIndex = 3;
        document.querySelector("nav").setAttribute("aria-hidden", "true");
        document.querySelector("#list").append(document.createElement("p"));
        document.querySelector("#prompt").setAttribute("aria-describedby", "nowhere");
        document.body.append(document.createElement("div"));
        }"""
    )
    rules = {line.partition(":")[0] for line in audit(page)["found"]}
    assert rules == {
        *("color-contrast", "duplicate-id", "tabindex", "aria-hidden-focus", "list"),
        *("aria-valid-attr-value", "region"),
    }


@pytest.mark.parametrize("screen", FULL)
def test_focus_moves_as_people_read(opened, screen):
    """Tab goes down a part of the page, left to right in a line, and part by part."""
    width, height = FULL[screen]
    page = opened(viewport={"width": width, "height": height})
    places = page.evaluate(
        """() => [...document.querySelectorAll("main section")].map(section =>
        [...section.querySelectorAll("button, input, select, textarea, summary")]
        .filter(x => x.checkVisibility() && !x.disabled).slice(0, 20).map(x => {
            const box = x.getBoundingClientRect();
            return [x.id || x.innerText, box.left, box.top, box.bottom];
        }))"""
    )
    assert [len(part) > 2 for part in places] == [True] * 3
    for part in places:
        for (name, left, _, bottom), (after, x, top, _) in itertools.pairwise(part):
            assert top >= bottom - 1 or x > left, (name, after)
    everything_open(page)
    seen = []
    page.focus("#prompt")
    for _ in range(200):
        page.keyboard.press("Tab")
        part = page.evaluate("document.activeElement.closest('section')?.id")
        if not part:
            break
        seen.append(part)
    assert [part for part, _ in itertools.groupby(seen)] == ["responses", "steering", "features"]
