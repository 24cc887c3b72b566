"""A client of `sarm serve`, on the standard library alone.

It needs neither torch nor transformers, can be pickled into another process, and is a TRL reward
function as it is: `GRPOTrainer(reward_funcs=[RewardClient(url)])`.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

#: Answers that another try may turn into rewards: queue full, overdue, a proxy without a server.
RETRIED = (408, 429, 502, 503, 504)


class RewardServerError(RuntimeError):
    """The server refused a request, or could not be reached; `status` is None then."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RewardClient:
    """Rewards from a `sarm serve` process.

    Args:
        url: of the server, e.g. "http://127.0.0.1:8000".
        token_env: environment variable with the bearer token; it is read at each request, so that
            a pickle does not carry the token.
        timeout: seconds for one try.
        retries: further tries after a connection error, a full queue or a missed deadline.
        batch_size: conversations in one request.
        name: under which TRL logs the reward.
    """

    def __init__(
        self,
        url: str,
        *,
        token_env: str | None = None,
        timeout: float = 180.0,
        retries: int = 5,
        batch_size: int = 256,
        name: str = "sarm_reward",
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"RewardClient: url must begin with http:// or https://, got {url!r}")
        if batch_size < 1 or retries < 0:
            raise ValueError("RewardClient: batch_size must be >= 1 and retries >= 0")
        self.url = url.rstrip("/")
        self.token_env = token_env
        self.timeout, self.retries, self.batch_size = timeout, retries, batch_size
        self.__name__ = name

    # ---- rewards --------------------------------------------------------------------------

    def score(self, conversations: Sequence[Sequence[dict]]) -> list[float]:
        """Rewards of message lists, in order."""
        return self._rewards("conversations", list(conversations))

    def __call__(self, prompts=None, completions=None, **columns) -> list[float | None]:
        """TRL's reward-function contract; None for a completion that is None."""
        if prompts is None or completions is None or len(prompts) != len(completions):
            raise ValueError("RewardClient: needs prompts and completions, equally many")
        items = [i for i, c in enumerate(completions) if c is not None]
        rows = [{"prompt": prompts[i], "completion": completions[i]} for i in items]
        out: list[float | None] = [None] * len(completions)
        for i, reward in zip(items, self._rewards("rows", rows), strict=True):
            out[i] = reward
        return out

    def get_reward(self, queries: list[str], prompts=None, labels=None) -> dict[str, Any]:
        """OpenRLHF's contract: whole rollouts as text, special tokens included."""
        return self._post(
            "/get_reward", {"query": list(queries), "prompts": prompts, "labels": labels}
        )

    def explain(self, messages: Sequence[dict], top: int = 20) -> dict[str, Any]:
        """The reward of one conversation as a sum over features."""
        return self._post("/explain", {"messages": list(messages), "top": top})

    def wait_until_ready(self, seconds: float = 300.0) -> None:
        """Return when the server has loaded its model."""
        end = time.monotonic() + seconds
        while True:
            try:
                self._once("/health", None)
                return
            except RewardServerError as error:
                if time.monotonic() > end:
                    raise
                if error.status not in (None, 503):
                    raise
            time.sleep(0.05)

    def _rewards(self, field: str, items: list) -> list[float]:
        rewards: list[float] = []
        for start in range(0, len(items), self.batch_size):
            part = items[start : start + self.batch_size]
            got = self._post("/score", {field: part})["rewards"]
            if len(got) != len(part):
                raise RewardServerError(f"{len(part)} items sent, {len(got)} rewards received")
            rewards += got
        return rewards

    # ---- HTTP -----------------------------------------------------------------------------

    def _post(self, path: str, body: dict) -> dict[str, Any]:
        waits = self._waits()
        while True:
            try:
                return self._once(path, body)
            except RewardServerError as error:
                wait = next(waits, None)
                if wait is None or error.status not in (None, *RETRIED):
                    raise
                time.sleep(wait)

    def _waits(self) -> Iterator[float]:
        """Seconds before each further try: doubling, with jitter so that clients spread out."""
        for attempt in range(self.retries):
            yield min(10.0, 0.25 * 2**attempt) * random.uniform(0.5, 1.0)

    def _once(self, path: str, body: dict | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self.token_env, '')}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise RewardServerError(
                    f"{self.url}{path}: {error.code}: {_message(error)}", error.code
                ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RewardServerError(f"{self.url}{path}: {error}") from error


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read(65536)
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text.decode("utf-8", "replace")[:200]
