"""What the page asks of its server, and what the server refuses."""

import json
from importlib import resources

import numpy as np
import pytest
from starlette.testclient import TestClient

from sarm.dashboard.app import MAX_BODY, Dashboard
from sarm.dashboard.profiles import file_name
from sarm.dashboard.sets import BINS, MOST_BINS, histogram, read_set
from sarm.dashboard.views import Views
from sarm.errors import InputError
from sarm.features import FeatureStore
from sarm.steering import read_profile

PROMPT = "question 1 the cat"
ASSETS = ("index.html", "style.css", "main.js", "dom.js", "icon.svg")


@pytest.fixture
def client(views):
    return TestClient(Dashboard(views).app, base_url="http://localhost")


@pytest.fixture
def bare(page_scorer):
    """Without database, set and folder."""
    return TestClient(Dashboard(Views(page_scorer, "bare")).app, base_url="http://localhost")


def message(answer, status):
    assert answer.status_code == status, answer.text
    found = answer.json()["error"]["message"]
    assert "\n" not in found
    return found


def strongest(views):
    return views.store.features("contribution", 1)[0].id


# ---- answers --------------------------------------------------------------------------------


def test_contributions_sum_to_the_reward(client, page_scorer):
    responses = ["on a mat thanks", "ugh no"]
    found = client.post("/api/score", json={"prompt": PROMPT, "responses": responses}).json()
    talks = [
        [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": r}]
        for r in responses
    ]
    for one, reward in zip(found["responses"], page_scorer.score(talks).tolist(), strict=True):
        assert one["reward"] == pytest.approx(reward, abs=1e-6)
        total = one["bias"] + sum(c["value"] for c in one["contributions"]) + one["rest"]
        assert total == pytest.approx(one["sum"], abs=1e-12)
        bound = 8 * 2**-24 * sum(abs(c["value"]) for c in one["contributions"])
        assert abs(one["sum"] - reward) <= bound
        assert one["n_rest"] == 0  # so that the page steers it exactly


def test_a_trace_has_a_number_for_every_token(client):
    body = {"prompt": PROMPT, "response": "on a mat", "top": 3}
    found = client.post("/api/trace", json=body).json()
    assert "".join(found["tokens"]) == "on a mat"
    assert len(found["features"]) == 3
    for values in (found["rewards"], *(f["activations"] for f in found["features"])):
        assert len(values) == len(found["tokens"])


def test_a_shift_is_that_of_a_steered_scorer(client, views, page_scorer, page_set):
    feature = strongest(views)
    fields = {"features": [{"feature": feature, "multiply": -1.5}]}
    found = client.post("/api/shift", json={"profile": fields}).json()
    talks = [c for item in page_set.latents.benchmark.items for c in item.conversations]
    before = page_scorer.score(talks).double().numpy()
    after = page_scorer.steer({feature: -1.5}).score(talks).double().numpy()
    assert found["shift"]["all"] == pytest.approx((after - before).mean() / before.std(), abs=1e-5)
    assert found["shift"]["all"] != 0
    (accuracy,) = found["accuracies"]
    for name, rewards in (("before", before), ("after", after)):
        assert accuracy[name] == pytest.approx((rewards[::2] > rewards[1::2]).mean())
    assert sum(found["histogram"]["before"]) == sum(found["histogram"]["after"]) == len(talks)


def test_no_change_moves_nothing(client):
    found = client.post("/api/shift", json={"profile": {"features": []}}).json()
    assert found["moved"] == found["shift"]["all"] == found["order_changed"] == 0
    assert found["histogram"]["before"] == found["histogram"]["after"]


@pytest.mark.parametrize("move", [0.0, 0.3, 40.0, -2.5])
def test_a_histogram_holds_everything(move):
    before = np.random.default_rng(0).normal(size=500)
    after = before + move
    found = histogram(before, after)
    edges = np.array(found["edges"])
    assert BINS <= len(edges) - 1 <= MOST_BINS
    assert (np.diff(edges) > 0).all()
    assert sum(found["before"]) == sum(found["after"]) == 500
    means = [
        np.average((edges[1:] + edges[:-1]) / 2, weights=found[k]) for k in ("before", "after")
    ]
    assert means[1] - means[0] == pytest.approx(move, abs=np.diff(edges).max())


@pytest.mark.parametrize("order", ["contribution", "weight", "frequency", "contrast", "id"])
def test_pages_of_features_are_the_whole_list(client, views, order):
    listed, offset = [], 0
    while True:
        query = {"order": order, "offset": offset, "limit": 10}
        page = client.get("/api/features", params=query).json()
        listed += [f["id"] for f in page["features"]]
        offset += 10
        if offset >= page["total"]:
            break
    assert listed == [f.id for f in views.store.features(order)]


def test_features_are_found_by_label_context_and_number(client, views):
    feature = strongest(views)
    ask = {"order": "weight"}
    by_label = client.get("/api/features", params={"q": "rainf", **ask}).json()
    assert [f["id"] for f in by_label["features"]] == [feature]
    by_context = client.get("/api/features", params={"q": "ugh", **ask}).json()
    assert by_context["total"] > 0
    assert all("ugh" in f["excerpt"] for f in by_context["features"])
    by_number = client.get("/api/features", params={"q": "#63", **ask}).json()
    assert 63 in [f["id"] for f in by_number["features"]]
    assert client.get("/api/features", params={"q": "zebra", **ask}).json()["total"] == 0


def test_a_label_written_meanwhile_is_seen(client, page_database, views):
    other = views.store.features("contribution", 2)[1].id
    client.get("/api/features", params={"order": "weight"})
    with FeatureStore(page_database, "rw") as store:
        store.add_label(other, "later", "written later")
    assert client.get(f"/api/features/{other}").json()["label"] == "written later"


def test_a_saved_profile_reads_back(client, views, page_scorer):
    features = [{"feature": 5, "ablate": True}, {"feature": 7, "multiply": -0.5}]
    fields = {"name": "fewer / fillers…", "features": features}
    assert client.post("/api/profiles", json={"profile": fields}).json() == {
        "name": "fewer-fillers.yaml"
    }
    path = views.profiles_dir / "fewer-fillers.yaml"
    found = read_profile(path, model=page_scorer.model)
    assert {j: c.multiply for j, c in found.changes.items()} == {5: 0.0, 7: -0.5}
    assert found.model is not None
    text = client.post("/api/yaml", json={"profile": fields}).json()["text"]
    assert text == path.read_text("utf-8")
    again = {"profile": fields | {"features": features[:1]}}
    assert "is there already" in message(client.post("/api/profiles", json=again), 409)
    assert client.post("/api/profiles", json=again | {"overwrite": True}).status_code == 200
    assert list(read_profile(path).changes) == [5]
    assert [p.name for p in views.profiles_dir.iterdir()] == [path.name]


def test_the_first_view_is_one_answer(client, bare, views):
    found = client.get("/api/start").json()
    assert found["about"] == client.get("/api/about").json()
    query = {"order": "contribution", "offset": 0, "limit": 50}
    assert found["features"] == client.get("/api/features", params=query).json()
    assert found["order"] == "contribution"
    empty = client.post("/api/shift", json={"profile": {"features": []}}).json()
    assert found["shift"] == empty
    assert found["profiles"] == []
    found = bare.get("/api/start").json()
    assert found["order"] == "weight"
    assert found["shift"] is None
    assert len(found["features"]["features"]) == 50


def test_files_that_a_browser_has_are_not_sent_again(client, views):
    first = client.get("/static/main.js")
    again = client.get("/static/main.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = client.get("/static/main.js", headers={"if-none-match": '"0123456789abcdef"'})
    assert other.content == first.content
    assert "/api/start" in client.get("/").headers["link"]
    guarded = TestClient(Dashboard(views, token="a").app, base_url="http://localhost")
    assert "link" not in guarded.get("/").headers  # what a browser asks by itself has no token


def test_a_saved_profile_is_loaded(client, views, page_scorer):
    strong = strongest(views)
    features = [{"feature": strong, "ablate": True}, {"feature": 7, "multiply": 4.5}]
    saved = client.post("/api/profiles", json={"profile": {"name": "a b", "features": features}})
    assert client.get("/api/profiles").json() == {"profiles": ["a-b.yaml"]}
    assert client.get("/api/start").json()["profiles"] == ["a-b.yaml"]
    found = client.get(f"/api/profiles/{saved.json()['name']}").json()
    assert found["file"] == "a-b.yaml"
    assert found["profile"]["name"] == "a b"
    assert found["profile"]["features"] == features
    weights = page_scorer.model.score.weight[0]
    assert found["known"]["7"]["weight"] == pytest.approx(weights[7].item())
    assert found["known"][str(strong)]["label"].startswith("rainfall")
    moved = client.post("/api/shift", json={"profile": found["profile"]})
    assert moved.json()["moved"] > 0


def test_profiles_written_by_hand_are_loaded(client, views):
    views.profiles_dir.mkdir()
    label = views.names()[strongest(views)]
    text = f"features: [{{label: {json.dumps(label)}, add: -0.5, clamp: [null, 2.0]}}]\n"
    text += "when: {weights: {3: 1.0}, above: 0.5}\n"
    (views.profiles_dir / "gated.yml").write_text(text)
    found = client.get("/api/profiles/gated.yml").json()["profile"]
    one = {"feature": strongest(views), "add": -0.5, "clamp": [None, 2.0]}
    assert found["features"] == [one]
    assert found["when"]["weights"] == {"3": 1.0}
    assert client.post("/api/shift", json={"profile": found}).status_code == 200


def test_without_database_and_sets_the_head_is_listed(bare, page_scorer):
    about = bare.get("/api/about").json()
    assert not about["database"]
    assert not about["saves"]
    assert about["sets"] == []
    weights = page_scorer.model.score.weight[0]
    page = bare.get("/api/features", params={"order": "weight", "limit": 5}).json()
    top = weights.abs().argsort(descending=True)[:5].tolist()
    assert [f["id"] for f in page["features"]] == top
    assert bare.get("/api/features/3").json()["weight"] == pytest.approx(weights[3].item())
    assert "--set" in message(bare.post("/api/shift", json={"profile": {"features": []}}), 422)
    fields = {"name": "a", "features": [{"feature": 1, "ablate": True}]}
    assert "--profiles" in message(bare.post("/api/profiles", json={"profile": fields}), 422)


# ---- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ([{"feature": 64, "multiply": 2}], "feature must be in [0, 64), got 64"),
        ([{"feature": -1, "multiply": 2}], "must be an integer >= 0"),
        ([{"feature": 1, "multiply": float("nan")}], "must be a finite number, got nan"),
        ([{"feature": j, "multiply": 1e39} for j in range(64)], "rewards that are not finite"),
        ([{"feature": 1, "multiply": 10**400}], "must be a finite number"),
        ([{"feature": 10**30, "multiply": 2}], "feature must be in [0, 64)"),
        ([{"feature": 1, "times": 2}], "unknown key 'times'"),
        ([{"feature": 1, "multiply": 2}, {"feature": 1, "add": 1}], "is in features[0] too"),
        ("all", "features must be a list"),
    ],
)
def test_bad_profiles_are_one_line(client, features, said):
    raw = json.dumps({"profile": {"features": features}}).encode()
    headers = {"content-type": "application/json"}
    assert said in message(client.post("/api/shift", content=raw, headers=headers), 422)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "malformed JSON"),
        (b"[]", 422, "expected an object"),
        (b'{"prompt": "a"}', 422, "responses"),
        (b'{"prompt": 3, "responses": ["b"]}', 422, "prompt"),
        (b'{"prompt": "a", "responses": []}', 422, "responses"),
        (b'{"prompt": "a", "responses": ["b"], "more": 1}', 422, "more"),
        (b" " * (MAX_BODY + 1), 413, "larger than"),
    ],
)
def test_bad_bodies_are_one_line(client, body, status, said):
    headers = {"content-type": "application/json"}
    assert said in message(client.post("/api/score", content=body, headers=headers), status)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/api/features/64", "expected 0 to 63, got 64"),
        ("/api/features/x", "whole number"),
        ("/api/features?order=rank", "order"),
        ("/api/features?order=id;DROP TABLE feature", "order"),
        ("/api/features?order=id&limit=9999", "limit"),
        ("/api/features?order=id&offset=-1", "offset"),
    ],
)
def test_bad_queries_are_one_line(client, path, said):
    assert said in message(client.get(path), 422)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", ""])
def test_foreign_hosts_are_refused(client, host):
    for path in ("/", "/api/about"):
        assert "not this page's" in message(client.get(path, headers={"host": host}), 421)


@pytest.mark.parametrize("host", ["localhost:8001", "127.0.0.1", "[::1]:80", "LOCALHOST"])
def test_own_hosts_are_not(client, host):
    assert client.get("/api/about", headers={"host": host}).status_code == 200


def test_an_allowed_host(views):
    app = Dashboard(views, hosts=["Box.local"]).app
    with TestClient(app, base_url="http://box.local:81") as client:
        assert client.get("/").status_code == 200


def test_other_sites_cannot_post(client):
    body = {"profile": {"features": []}}
    foreign = {"origin": "http://evil.example"}
    assert "may not ask" in message(client.post("/api/shift", json=body, headers=foreign), 403)
    own = {"origin": "http://localhost"}
    assert client.post("/api/shift", json=body, headers=own).status_code == 200
    form = {"content-type": "text/plain"}
    raw = json.dumps(body).encode()
    assert "application/json" in message(client.post("/api/shift", content=raw, headers=form), 415)


def test_a_token_guards_the_api_but_not_the_files(views):
    client = TestClient(Dashboard(views, token="s3cret").app, base_url="http://localhost")
    assert client.get("/").status_code == 200
    for headers in ({}, {"authorization": "Bearer wrong"}):
        assert "token" in message(client.get("/api/about", headers=headers), 401)
        post = client.post("/api/shift", json={"profile": {"features": []}}, headers=headers)
        assert "token" in message(post, 401)
    right = {"authorization": "Bearer s3cret"}
    assert client.get("/api/about", headers=right).status_code == 200


def test_every_answer_carries_the_policy(client):
    for path in ("/", "/static/main.js", "/api/about", "/nowhere"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    ["/static/../app.py", "/static/%2e%2e/app.py", "/static/app.py", "/docs", "/openapi.json"],
)
def test_nothing_else_is_served(client, path):
    message(client.get(path), 404)


def test_names_of_files():
    assert file_name("../../etc/passwd") == "etc-passwd.yaml"
    assert file_name("Größe 2") == "Groe-2.yaml"
    for bad in ("", "..", "///", "文", "a" * 81):
        with pytest.raises(InputError, match="name"):
            file_name(bad)


@pytest.mark.parametrize(
    "name",
    ["..%2Fsecret.yaml", "%2e%2e%2fsecret.yaml", "..", "link.yaml", "none.yaml", "a.txt", "%00"],
)
def test_only_files_of_the_list_are_loaded(client, views, tmp_path, name):
    views.profiles_dir.mkdir()
    secret = tmp_path / "secret.yaml"
    secret.write_text("features: [{feature: 1, ablate: true}]")
    (views.profiles_dir / "link.yaml").symlink_to(secret)
    (views.profiles_dir / "a.txt").write_text(secret.read_text())
    assert client.get("/api/profiles").json() == {"profiles": []}
    answer = client.get(f"/api/profiles/{name}")
    assert answer.status_code in (404, 422)
    assert "ablate" not in answer.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("features: [{feature: 99, ablate: true}]", "feature must be in [0, 64), got 99"),
        ("model: abc\nfeatures: [{feature: 1, ablate: true}]", "another model"),
        ("features: [{label: nobody, ablate: true}]", "nobody"),
        ("features: [", "not YAML"),
        ("[" * 10_000, "not YAML"),
        ("name: 2001-99-99", "not YAML"),
        ("#" * (2**20 + 1), "larger than"),
        ("\xff", "not YAML"),
    ],
)
def test_bad_files_are_one_line(client, views, text, said):
    views.profiles_dir.mkdir()
    (views.profiles_dir / "bad.yaml").write_bytes(text.encode("latin-1"))
    assert said in message(client.get("/api/profiles/bad.yaml"), 422)


def test_a_link_in_the_folder_is_not_followed(client, views, tmp_path):
    target = tmp_path / "elsewhere"
    target.write_text("kept")
    views.profiles_dir.mkdir()
    (views.profiles_dir / "a.yaml").symlink_to(target)
    fields = {"name": "a", "features": [{"feature": 1, "ablate": True}]}
    answer = client.post("/api/profiles", json={"profile": fields, "overwrite": True})
    assert "is a link" in message(answer, 422)
    assert target.read_text() == "kept"


def test_a_database_of_another_model_is_refused(tiny_scorer, page_database):
    other = tiny_scorer(seed=1)
    said = pytest.raises(InputError, match="collected with another model")
    with FeatureStore(page_database) as store, said:
        Views(other, "other", store)


def test_a_bug_is_one_line_without_a_traceback(client, views, monkeypatch):
    monkeypatch.setattr(views, "about", lambda: 1 / 0)
    assert message(client.get("/api/about"), 500) == "ZeroDivisionError: division by zero"


def test_sets_are_told_apart(tmp_path, page_pairs):
    row = {"id": "1", "prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}
    bench = tmp_path / "chat_filtered.json"
    bench.write_text(json.dumps([row | {"domain": "chat"}]))
    assert read_set(str(bench)).name.startswith("RM-Bench")
    row = {"id": "1", "prompt": "p", "chosen": ["a"], "rejected": ["d", "e", "f"], "subset": "Math"}
    (tmp_path / "rb2.jsonl").write_text(json.dumps(row) + "\n")
    assert read_set(str(tmp_path / "rb2.jsonl")).name.startswith("RewardBench 2")
    assert len(read_set(str(page_pairs)).items) == 20
    assert 0 < len(read_set(f"{page_pairs}#1/2").items) < 20


def test_the_package_holds_the_files():
    static = resources.files("sarm.dashboard") / "static"
    for name in ASSETS:
        assert static.joinpath(name).is_file()
    page = static.joinpath("index.html").read_text("utf-8")
    assert "://" not in page  # nothing of another host
    for script in static.iterdir():
        if script.name.endswith(".js"):
            text = script.read_text("utf-8")
            assert "innerHTML" not in text
            assert "insertAdjacentHTML" not in text
