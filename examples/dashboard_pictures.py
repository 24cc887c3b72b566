"""Pictures of a running `sarm dashboard`, as docs/dashboard.md shows them.

    sarm dashboard -m SARM --features features.db --set preferences_valid.jsonl.gz --port 8001 &
    python examples/dashboard_pictures.py http://127.0.0.1:8001 docs

Needs pip install 'sarm[test-page]' and a Chromium.
"""

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PROMPT = "How do I keep basil alive on a window sill?"
RESPONSES = (
    "Basil wants **light**, warmth and steady water:\n\n- six hours of sun,\n- soil that is moist, "
    "never wet,\n- pinch the tips each week.",
    "It is just a plant, who cares. Buy another one when it dies.",
)


def main(url: str, folder: Path) -> None:
    with sync_playwright() as driver:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        laptop = open_page(browser, url, 1280, 900)
        score(laptop)
        steer(laptop)
        laptop.locator("[data-tokens]").first.click()
        laptop.wait_for_selector(".tokens span")
        laptop.locator("article[aria-label='Response 1']").evaluate(
            "e => e.scrollIntoView({block: 'start', behavior: 'instant'})"
        )
        save(laptop, folder / "dashboard.png")
        laptop.fill("#query", "cannot help")
        laptop.wait_for_selector("#list .excerpt")
        laptop.locator("#list button.item").first.click()
        laptop.wait_for_selector(".detail .tokens")
        laptop.locator("#features").evaluate(
            "e => e.scrollIntoView({block: 'start', behavior: 'instant'})"
        )
        save(laptop, folder / "dashboard_features.png")
        phone = open_page(browser, url, 360, 740, color_scheme="dark")
        score(phone)
        steer(phone)
        phone.locator("#steering").evaluate(
            "e => e.scrollIntoView({block: 'start', behavior: 'instant'})"
        )
        save(phone, folder / "dashboard_phone.png")
        browser.close()


def open_page(browser, url: str, width: int, height: int, **options):
    page = browser.new_context(viewport={"width": width, "height": height}, **options).new_page()
    page.goto(url)
    page.wait_for_selector("#list li")
    page.wait_for_selector("#chart svg.histogram")
    return page


def score(page) -> None:
    page.fill("#prompt", PROMPT)
    for i, response in enumerate(RESPONSES, 1):
        page.fill(f"#answer-{i}", response)
    page.click("#score button[type=submit]")
    page.wait_for_selector("#results .reward")


def steer(page) -> None:
    """The feature with the largest contribution, turned around."""
    before = page.inner_text("#shift-status")
    page.fill("#feature-number", page.locator("#list .title").first.inner_text().split(":")[0])
    page.keyboard.press("Enter")
    page.locator("#sliders input").first.fill("-2")
    page.wait_for_function(
        "t => document.querySelector('#shift-status').innerText !== t", arg=before
    )


def save(page, path: Path) -> None:
    """A screenshot in 64 colours: a quarter of the bytes, to the eye the same."""
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
