"""The page in a browser: what it shows, and that it asks no other host (`opened` in conftest)."""

import re

import pytest
from page_actions import add_slider, playwright, score, settled, slide

from sarm.steering import read_profile

# the markup that answers, contexts and a label hold; see conftest
PWNED = "pwned"


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


def test_saved_profiles_are_loaded(opened, views):
    (strong, other) = (f.id for f in views.store.features("contribution", 2))
    page = opened()
    assert page.locator("#load").is_hidden()
    add_slider(page, strong)
    settled(page, lambda: slide(page, 0.5))
    page.fill("#profile-name", "half of it")
    page.click("#save-there")
    playwright.expect(page.locator("#save-status")).to_have_text("Saved as half-of-it.yaml.")
    text = f"features: [{{feature: 7, multiply: 4.5}}, {{feature: {other}, clamp: [null, 2]}}]"
    (views.profiles_dir / "by-hand.yaml").write_text(text)
    page = opened()
    status = page.locator("#save-status")
    score(page, "on a mat thanks")
    options = page.locator("#saved option")
    assert options.all_inner_texts() == ["by-hand.yaml", "half-of-it.yaml"]
    page.select_option("#saved", "half-of-it.yaml")
    answer = settled(page, page.get_by_role("button", name="Load", exact=True).click)
    assert answer["shift"]["all"] != 0
    playwright.expect(status).to_have_text("half-of-it.yaml loaded: 1 features.")
    assert page.input_value(f"#slider-{strong}") == "0.5"
    assert page.input_value("#profile-name") == "half of it"
    assert "steered" in page.locator("#results .reward").inner_text()
    page.select_option("#saved", "by-hand.yaml")
    by_hand = settled(page, page.get_by_role("button", name="Load", exact=True).click)
    assert by_hand["shift"]["all"] != answer["shift"]["all"]
    assert page.locator("#sliders li").count() == 2  # in the place of what there was
    assert page.input_value("#slider-7") == "4.5"  # beyond the range of other sliders
    assert "clamped to ∞ … 2" in page.inner_text(f"#sliders li[data-feature='{other}']")
    # a clamp is not a factor of a contribution: the page does not guess
    assert "steered" not in page.locator("#results .reward").inner_text()
    (views.profiles_dir / "by-hand.yaml").write_text("features: 3")
    page.get_by_role("button", name="Load", exact=True).click()
    playwright.expect(status).to_have_text(re.compile("features must be a list"))


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
