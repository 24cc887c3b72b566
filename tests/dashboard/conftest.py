"""A tiny SARM with a feature database, an evaluation set and a folder for profiles."""

import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tiny_sarm

import sarm
from sarm.dashboard.sets import EvaluationSet, read_set
from sarm.dashboard.views import Views
from sarm.evaluation.profiles import latent_sets
from sarm.features import FeatureStore
from sarm.features.collect import CollectOptions, collect
from sarm.tokens import ConversationEncoder

MARKUP = "<img src=x onerror=\"document.title='pwned'\">"


@pytest.fixture(scope="session")
def tiny_scorer(tmp_path_factory):
    """made(seed) -> a scorer with a random SAE of 64 latents and a random head."""
    folder = tiny_sarm.save_backbone(tmp_path_factory.mktemp("page") / "backbone")

    def made(seed=0):
        backbone = sarm.load_backbone(folder, dtype=torch.float32, device="cpu")
        torch.manual_seed(seed)
        sae = sarm.TopKSAE(32, 64, 6)
        model = sarm.SarmForSequenceClassification.from_parts(backbone, sae, torch.randn(1, 64))
        return sarm.SARMScorer(model, tiny_sarm.make_tokenizer(), prefix_cache_mib=0)

    return made


@pytest.fixture(scope="session")
def page_scorer(tiny_scorer):
    return tiny_scorer()


@pytest.fixture(scope="session")
def page_pairs(tmp_path_factory):
    """20 pairs; the answers of one hold markup, and so do contexts collected from them."""
    rows = tiny_sarm.make_pairs(20)
    rows[3]["chosen"][0]["content"] += " " + MARKUP
    return tiny_sarm.write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def page_database(page_scorer, page_pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("database") / "features.db"
    collect(page_scorer, [page_pairs], out, CollectOptions(contexts=8, window=24, block=8))
    with FeatureStore(out, "rw") as store:
        strongest = store.features("contribution", 1)[0].id
        store.add_label(strongest, "test", f"rainfall {MARKUP}")
    return out


@pytest.fixture(scope="session")
def page_set(page_scorer, page_pairs):
    encoder = ConversationEncoder(page_scorer.tokenizer, page_scorer.max_length)
    (latents,) = latent_sets(page_scorer.model, encoder, [read_set(str(page_pairs))])
    return EvaluationSet(page_scorer.model, latents)


@pytest.fixture
def views(page_scorer, page_database, page_set, tmp_path):
    with FeatureStore(page_database) as store:
        folder = tmp_path / "profiles"
        yield Views(page_scorer, "tiny", store, [page_set], folder)


# ---- a browser ------------------------------------------------------------------------------

WAIT = 30  # seconds; every wait is on an event, and bounded
ARGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGS += [f"--disable-{what}" for what in ("background-networking", "component-update", "sync")]


@pytest.fixture(scope="module")  # Playwright's event loop occupies this thread until it ends
def browser():
    from page_actions import playwright

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
    from sarm.dashboard.app import Dashboard
    from sarm.integrations.process import Server, listen

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
    import page_actions

    pages = []

    def start(token=None, on_request=lambda request: None, **context):
        context.setdefault("viewport", {"width": 1280, "height": 900})
        page = browser.new_context(accept_downloads=True, **context).new_page()
        page.set_default_timeout(WAIT * 1000)
        seen, problems = [], []
        page.on("request", lambda request: seen.append(request.url))
        page.on("request", on_request)
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        url = served(token)
        pages.append((page, url, seen, problems))
        page.goto(url)
        if token is None:
            page_actions.ready(page)
        return page

    yield start
    for page, url, seen, problems in pages:
        allowed = (urlsplit(url).netloc, "")  # "": blob: and data: stay within the browser
        assert [u for u in seen if urlsplit(u).netloc not in allowed and u[:5] != "blob:"] == []
        # Chromium itself reports every answer that is an error; which ones come is tested below
        assert [p for p in problems if not p.startswith("Failed to load resource")] == []
        page.context.close()
