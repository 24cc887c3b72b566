"""OpenRLHF's Python-file contract: `reward_func(queries, prompts, labels)`.

Without any code OpenRLHF talks to `sarm serve` itself: `--reward.remote_url
http://host:8000/get_reward`. Use a file for more: a bearer token, retries, or a scorer inside the
process. The environment says which: SARM_URL (and SARM_TOKEN_ENV), or SARM_MODEL for a checkpoint.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from sarm.integrations.client import RewardClient

RewardFunction = Callable[..., dict[str, Any]]


def reward_func(queries: list[str], prompts=None, labels=None, **kwargs) -> dict[str, Any]:
    """Rewards of whole rollouts: numbers for one query, lists for several."""
    return _backend()(queries, prompts, labels)


@cache
def _backend() -> RewardFunction:
    url, model = os.environ.get("SARM_URL"), os.environ.get("SARM_MODEL")
    if url:
        return RewardClient(url, token_env=os.environ.get("SARM_TOKEN_ENV")).get_reward
    if model:
        return LocalRewards(model)
    raise ValueError("set SARM_URL to a `sarm serve` address, or SARM_MODEL to a checkpoint")


class LocalRewards:
    """A scorer in this process behind OpenRLHF's contract.

    OpenRLHF calls from many threads with one query each: whoever gets the scorer scores for all
    that wait.
    """

    def __init__(self, model: str, **options) -> None:
        from sarm.integrations.inputs import Codec
        from sarm.scorer import SARMScorer

        self._scorer = SARMScorer.from_pretrained(model, **options)
        self._codec = Codec(self._scorer)
        self._scoring, self._listing = threading.Lock(), threading.Lock()
        self._waiting: list[tuple[list[list[int]], list]] = []

    def __call__(self, queries: list[str], prompts=None, labels=None) -> dict[str, Any]:
        """Rewards of whole rollouts, special tokens included."""
        from sarm.integrations.contracts import RewardBody, Scored

        body = RewardBody(query=queries, prompts=prompts, labels=labels)
        encoded = self._codec.encode(body.inputs(), body.encoding())
        rewards = self._score([e.ids for e in encoded])
        lengths, dropped = [len(e.ids) for e in encoded], [e.dropped for e in encoded]
        return body.answer(Scored(rewards, lengths, dropped), "")

    def _score(self, rows: list[list[int]]) -> list[float]:
        from sarm.integrations.batching import RewardError, score_each

        outcomes: list[float | Exception] = []
        with self._listing:
            self._waiting.append((rows, outcomes))
        with self._scoring:
            with self._listing:
                batch, self._waiting = self._waiting, []
            every = [row for mine, _ in batch for row in mine]
            done = score_each(lambda r: self._scorer.score_token_ids(r).tolist(), every)
            for mine, out in batch:
                out += done[: len(mine)]
                del done[: len(mine)]
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, Exception):
                raise RewardError(i, f"queries[{i}]: {outcome}")
        return outcomes  # type: ignore[return-value]
