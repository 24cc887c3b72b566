"""verl: `compute_score`, and a reward manager that scores the raw prompt with the answer.

verl hands a reward function the answer but not the prompt: put the prompt into `extra_info`, or use
`SarmRewardManager`, which reads `raw_prompt` (data.return_raw_chat=True). Both ask a `sarm serve`
process at `url` or $SARM_URL; verl itself is imported when the manager is asked for.
"""

from __future__ import annotations

import asyncio
import os
from functools import cache
from typing import Any

from sarm.integrations.client import RewardClient


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any = None,
    extra_info: dict | None = None,
    *,
    url: str | None = None,
    **kwargs,
) -> dict[str, float]:
    """verl's custom reward function; `extra_info` holds the prompt, a string or messages."""
    info = extra_info or {}
    prompt = info.get("prompt", info.get("raw_prompt"))
    if prompt is None:
        raise ValueError(
            "compute_score: extra_info holds no `prompt`; add it to the dataset, or use "
            "SarmRewardManager"
        )
    return {"score": _reward(prompt, solution_str, url)}


async def compute_score_async(*args, **kwargs) -> dict[str, float]:
    """`compute_score` without blocking verl's event loop."""
    return await asyncio.to_thread(compute_score, *args, **kwargs)


def _reward(prompt: Any, answer: str, url: str | None) -> float:
    url = url or os.environ.get("SARM_URL")
    if not url:
        raise ValueError("set SARM_URL to the address of a `sarm serve` process")
    prompt = prompt if isinstance(prompt, str) else [dict(m) for m in prompt]  # numpy's too
    (reward,) = _client(url)([prompt], [answer])
    assert reward is not None
    return reward


@cache
def _client(url: str) -> RewardClient:
    return RewardClient(url, token_env=os.environ.get("SARM_TOKEN_ENV"))


def __getattr__(name: str) -> Any:
    if name == "SarmRewardManager":
        return _manager()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _manager() -> type:
    try:
        from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
    except ImportError as error:
        raise ImportError(f"SarmRewardManager needs verl >= 0.7 ({error})") from error

    class SarmRewardManager(RewardManagerBase):
        """Scores the dataset's messages with the decoded answer."""

        async def run_single(self, data) -> dict:
            """The reward of the last sequence of `data`."""
            item = data[-1:][0]
            if "raw_prompt" not in item.non_tensor_batch:
                raise ValueError("SarmRewardManager needs data.return_raw_chat=True")
            answer = await asyncio.to_thread(self._answer, item.batch)
            prompt = item.non_tensor_batch["raw_prompt"]
            reward = await asyncio.to_thread(_reward, prompt, answer, None)
            return {"reward_score": reward, "reward_extra_info": {"sarm_reward": reward}}

        def _answer(self, batch) -> str:
            """The response's text, its padding left out."""
            ids = batch["responses"]
            length = int(batch["attention_mask"][-len(ids) :].sum())
            return self.tokenizer.decode(ids[:length], skip_special_tokens=True)

    SarmRewardManager.__module__ = __name__
    return SarmRewardManager
