"""A database of synthetic features and an endpoint on loopback to label them with."""

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import chat_endpoint

from sarm.features import FeatureStore
from sarm.labels.contexts import Sampling
from sarm.labels.endpoint import Endpoint, Settings
from sarm.labels.records import Records
from sarm.labels.run import Labeler, pending


@pytest.fixture
def database(tmp_path):
    return chat_endpoint.make_database(tmp_path / "f.db")


@pytest.fixture
def store(database):
    with FeatureStore(database, "rw") as store:
        yield store


@pytest.fixture
def label(database):
    """Label a database through an endpoint as the command does; returns (report, usage)."""

    def run(url, path=database, key=None, model="m", batch=4, redo=False, retry_failed=False, **s):
        s = {"timeout": 5.0, "retries": 2, "concurrency": 2, **s}

        async def work():
            with FeatureStore(path, "rw") as store:
                records = Records(store, model)
                features = [f.id for f in store.features()]
                todo = pending(records, features, redo=redo, retry_failed=retry_failed)
                async with Endpoint(Settings(model, url, **s), key) as endpoint:
                    labeler = Labeler(store, endpoint, Sampling(held_out=6), batch=batch, redo=redo)
                    return await labeler.run(todo), endpoint.usage

        return asyncio.run(work())

    return run


@pytest.fixture(autouse=True)
def _quick_backoff(monkeypatch):
    """The client's first wait is half a second; tests need its order, not its length."""
    from openai import _base_client

    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.001)
