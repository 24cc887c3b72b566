"""The page in a browser: what it shows, its keyboard, a phone, and that it asks no other host.

Pictures are judged by the geometry of the chart, which holds no text: a stored picture would
depend on the fonts, the version of Chromium and the CPU's rounding of colours.
"""

import io
import itertools
import json
import re
import shutil
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from sarm.dashboard.app import Dashboard
from sarm.features import FeatureStore
from sarm.integrations.process import Server, listen
from sarm.steering import read_profile

playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'sarm[test-page]'")
Image = pytest.importorskip("PIL.Image", reason="pip install 'sarm[test-page]'")

WAIT = 30  # seconds; every wait is on an event, and bounded
ARGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGS += [f"--disable-{what}" for what in ("background-networking", "component-update", "sync")]
# the markup that answers, contexts and a label hold; see conftest
PWNED = "pwned"


@pytest.fixture(scope="module")  # Playwright's event loop occupies this thread until it ends
def browser():
    with playwright.sync_playwright() as driver:
        names = ("chromium", "chromium-browser", "google-chrome")
        path = next((found for name in names if (found := shutil.which(name))), None)
        try:
            found = driver.chromium.launch(executable_path=path, args=ARGS)
        except playwright.Error as error:
            pytest.skip(f"no Chromium that starts: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def served(views):
    """serve(token=None) -> the page's URL; stopped at the end."""
    running = []

    def serve(token=None):
        sock = listen("127.0.0.1", 0)
        server = Server(Dashboard(views, token=token))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{sock.getsockname()[1]}/"

    yield serve
    for server, thread in running:
        server.stop()
        thread.join(WAIT)
        assert not thread.is_alive()


@pytest.fixture
def opened(browser, served):
    """opened(**context) -> a page that is ready; at the end: no error, no other host."""
    pages = []

    def start(token=None, **context):
        context.setdefault("viewport", {"width": 1280, "height": 900})
        page = browser.new_context(accept_downloads=True, **context).new_page()
        page.set_default_timeout(WAIT * 1000)
        seen, problems = [], []
        page.on("request", lambda request: seen.append(request.url))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        url = served(token)
        pages.append((page, url, seen, problems))
        page.goto(url)
        if token is None:
            ready(page)
        return page

    yield start
    for page, url, seen, problems in pages:
        allowed = (urlsplit(url).netloc, "")  # "": blob: and data: stay within the browser
        assert [u for u in seen if urlsplit(u).netloc not in allowed and u[:5] != "blob:"] == []
        # Chromium itself reports every answer that is an error; which ones come is tested below
        assert [p for p in problems if not p.startswith("Failed to load resource")] == []
        page.context.close()


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


# ---- what it does ---------------------------------------------------------------------------


def test_scores_and_explains(opened, page_scorer):
    page = opened()
    score(page, "on a mat thanks", "ugh no")
    talk = [{"role": "user", "content": "question 1 the cat"}]
    rewards = page_scorer.score(
        [[*talk, {"role": "assistant", "content": r}] for r in ("on a mat thanks", "ugh no")]
    ).tolist()
    shown = page.locator("#results .reward").all_inner_texts()
    for text, reward in zip(shown, rewards, strict=True):
        assert text == f"Reward {'−' if reward < 0 else '+'}{abs(reward):.4f}"
        assert f"{abs(reward):.6f}" in page.inner_text("#results")  # as the sum of contributions
    margin = abs(rewards[0] - rewards[1])
    assert f"the margin is +{margin:.4f}" in page.inner_text("#results")
    assert "Rewards: response 1" in page.inner_text("#score-status")


def test_tokens_are_coloured_by_a_feature(opened):
    page = opened()
    score(page, "on a mat thanks")
    page.locator("[data-tokens]").first.click()
    page.wait_for_selector(".tokens span")
    assert "".join(page.locator(".tokens span").all_inner_texts()) == "on a mat thanks"
    colours = "s => s.map(x => x.style.backgroundColor).filter(Boolean).length"
    assert page.eval_on_selector_all(".tokens span", colours) > 0
    page.locator(".tokens span").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("output").startswith("token 2 of ")


def test_a_slider_shifts_the_distribution(opened, page_scorer, page_set):
    page = opened()
    score(page, "on a mat thanks", "ugh no")
    before = page.inner_text("#shift-status")
    button = page.locator("#results .card[aria-label='Response 1'] .name").first
    settled(page, button.click)
    feature = int(page.get_attribute("#sliders li", "data-feature"))
    answer = settled(page, lambda: slide(page, -2))
    assert page.inner_text("#shift-status") != before
    expected = page_set.sd * answer["shift"]["all"]
    talks = [c for item in page_set.latents.benchmark.items for c in item.conversations]
    moved = page_scorer.steer({feature: -2}).score(talks) - page_scorer.score(talks)
    assert moved.double().mean().item() == pytest.approx(expected, abs=1e-4)
    talk = [
        {"role": "user", "content": "question 1 the cat"},
        {"role": "assistant", "content": "on a mat thanks"},
    ]
    (steered,) = page_scorer.steer({feature: -2}).score([talk]).tolist()
    text = page.locator("#results .reward").first.inner_text()
    assert text.endswith(f"steered {'−' if steered < 0 else '+'}{abs(steered):.4f}")
    settled(page, page.get_by_role("button", name=f"Ablate feature {feature}").click)
    slider = page.locator("#sliders input")
    assert slider.get_attribute("aria-valuetext") == "ablated"
    answer = settled(page, page.get_by_role("button", name=f"Reset feature {feature}").click)
    assert answer["moved"] == 0


def test_features_are_searched_and_shown(opened):
    page = opened()
    page.fill("#query", "rainf")
    status = page.locator("#search-status")
    playwright.expect(status).to_have_text("1 to 1 of 1 features")
    page.locator("#list button.item").click()
    page.wait_for_selector(".detail .tokens span")
    page.get_by_role("button", name="Steer feature").click()
    assert page.locator("#sliders li").count() == 1
    page.fill("#query", "no such word")
    playwright.expect(status).to_have_text("No feature found.")
    page.fill("#query", "")
    page.select_option("#order", "id")
    playwright.expect(page.locator("#list .title").first).to_have_text(re.compile(r"\b\d+\b"))


def test_profiles_are_saved_and_downloaded(opened, views, page_scorer, tmp_path):
    page = opened()
    add_slider(page, 5)
    settled(page, lambda: slide(page, 0.5))
    page.fill("#profile-name", "half of 5")
    page.click("#save-there")
    playwright.expect(page.locator("#save-status")).to_have_text("Saved as half-of-5.yaml.")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "downloaded.yaml")
    for path in (views.profiles_dir / "half-of-5.yaml", tmp_path / "downloaded.yaml"):
        profile = read_profile(path, model=page_scorer.model)
        assert {j: c.multiply for j, c in profile.changes.items()} == {5: 0.5}
    page.on("dialog", lambda dialog: dialog.dismiss())
    page.click("#save-there")
    playwright.expect(page.locator("#save-status")).to_have_text(re.compile("is there already"))


def test_an_error_is_told(opened):
    page = opened()
    page.fill("#feature-number", "99")
    page.keyboard.press("Enter")
    told = page.locator("#shift-status")
    playwright.expect(told).to_have_text("feature: expected 0 to 63, got 99")
    assert "bad" in told.get_attribute("class")


def test_markup_stays_text(opened):
    page = opened()
    markup = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
    score(page, markup, "b")
    page.locator("[data-tokens]").first.click()
    page.wait_for_selector(".tokens span")
    assert "".join(page.locator(".tokens span").all_inner_texts()) == markup
    page.fill("#query", "rainf")  # its label holds markup
    playwright.expect(page.locator("#list button.item")).to_have_count(1)
    assert PWNED in page.inner_text("#list .title")
    page.fill("#query", PWNED)  # and so do contexts
    playwright.expect(page.locator("#list .excerpt").first).to_contain_text(PWNED)
    page.locator("#list button.item").first.click()
    page.wait_for_selector(".detail .tokens span")
    page.locator("#list").get_by_role("button", name="Steer feature").click()
    assert page.locator("main img, main script").count() == 0
    assert "pwned" not in page.title()


# ---- for everybody --------------------------------------------------------------------------


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


# ---- pictures and time ----------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_chart_draws_the_counts(opened, views, scheme):
    (strongest,) = (f.id for f in views.store.features("contribution", 1))
    page = opened(color_scheme=scheme)
    add_slider(page, strongest)
    counts = settled(page, lambda: slide(page, -2))["histogram"]
    assert counts["before"] != counts["after"]
    chart = page.locator("svg.histogram")

    def only(shown):
        page.eval_on_selector_all(
            "svg.histogram > *",
            "(s, shown) => s.forEach(x => "
            "x.style.visibility = x.matches(shown) ? 'visible' : 'hidden')",
            shown,
        )
        return pixels(chart)

    most = max(counts["before"] + counts["after"])
    empty = only(".none")
    height, width, _ = empty.shape
    middles = ((np.arange(len(counts["before"])) + 0.5) * width / len(counts["before"])).astype(int)
    for name, shown in (("before", "rect"), ("after", "path")):
        inked = np.abs(only(shown) - empty).sum(2)[:, middles] > 30  # (H, B)
        tops = np.where(inked.any(0), height - inked.argmax(0), 0)
        expected = np.array(counts[name]) / most * (height * 156 / 160)
        assert np.abs(tops - expected).max() <= 3, name


@pytest.mark.slow
def test_the_first_view_takes_under_a_second(opened):
    """Not in a shared CI, whose machines are busy; a warm browser, a second page."""
    opened()
    start = time.perf_counter()
    opened()
    seconds = time.perf_counter() - start
    print(f"first view, server start included: {seconds:.2f} s")
    assert seconds < 1


@pytest.mark.slow
def test_5000_features_are_searched_without_lag(opened, views, tmp_path):
    """From a key to the new list, with 5,000 features of 20 contexts and a label each."""
    views.store, views._weights = crowd(tmp_path / "crowd.db", views.store), torch.zeros(5000)
    page = opened()
    playwright.expect(page.locator("#search-status")).to_have_text("1 to 50 of 5000 features")
    for query, found in (("basil", 5000), ("number 4999", 1), ("b", 5000)):
        start = time.perf_counter()
        with page.expect_response(lambda r, q=query: f"q={q.replace(' ', '+')}&" in r.url):
            page.fill("#query", query)
        last = min(50, found)
        playwright.expect(page.locator("#search-status")).to_have_text(
            f"1 to {last} of {found} features"
        )
        page.wait_for_function(
            "n => document.querySelectorAll('#list > li').length === n", arg=last
        )
        seconds = time.perf_counter() - start
        print(f"{query!r}: {1000 * seconds:.0f} ms, the 80 ms until typing has ended included")
        assert seconds < 1
        page.fill("#query", "")
        playwright.expect(page.locator("#search-status")).to_have_text("1 to 50 of 5000 features")


def crowd(path, store):
    """A database of 5,000 features, all like the first of `store`."""
    many = FeatureStore(path, "rw")
    (numbers,) = store.rows("SELECT * FROM feature ORDER BY id LIMIT 1")
    many.set_meta(**store.meta)
    marks = ",".join("?" * len(numbers))
    with many.transaction() as db:
        rows = [(i, 1, *numbers[2:]) for i in range(5000)]
        db.executemany(f"INSERT INTO feature VALUES ({marks})", rows)
        for i in range(5000 * 20):
            text = [" water", " basil", f" of {i % 97}"]
            row = (i, i // 20, "top", 1.0, 3, json.dumps(text), "[0, 0, 1]", "made up")
            db.execute("INSERT INTO context VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            db.execute("INSERT INTO context_words (rowid, text) VALUES (?, ?)", (i, "".join(text)))
        for i in range(5000):
            many.add_label(i, "test", f"number {i}")
    return many
