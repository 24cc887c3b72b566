"""OpenRLHF's and verl's contracts, as these packages call them."""

import asyncio
import importlib.util
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from sarm.integrations import openrlhf, verl

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_file(path):
    """A module from its path, as OpenRLHF and verl load user code."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    for name in ("SARM_URL", "SARM_MODEL", "SARM_TOKEN_ENV"):
        monkeypatch.delenv(name, raising=False)
    openrlhf._backend.cache_clear()
    verl._client.cache_clear()


def rollouts(scorer, talks):
    return [scorer.tokenizer.apply_chat_template(t, tokenize=False) for t in talks]


# ---- OpenRLHF ------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["url", "model"])
def test_openrlhf_file_scores_one_query_at_a_time_from_many_threads(
    where, serve, sarm_dir, scorer, talks, monkeypatch
):
    if where == "url":
        monkeypatch.setenv("SARM_URL", serve().url)
    else:
        monkeypatch.setenv("SARM_MODEL", str(sarm_dir))
    reward_func = load_file(EXAMPLES / "openrlhf_reward.py").reward_func
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda q: reward_func([q], ["p"], [None]), rollouts(scorer, talks)))
    rewards = torch.tensor([d["rewards"] for d in done])  # as OpenRLHF builds them
    torch.testing.assert_close(rewards, scorer.score(talks), rtol=1e-4, atol=1e-5)
    assert all(d["scores"] == d["rewards"] for d in done)
    assert done[0]["extra_logs"]["sarm_dropped_tokens"] == 0


def test_openrlhf_local_bad_query_fails_alone(sarm_dir, scorer, talks):
    local = openrlhf.LocalRewards(sarm_dir)
    with pytest.raises(ValueError, match=r"query\[0\]: empty"):
        local([""])
    (text,) = rollouts(scorer, talks[:1])
    real = local._scorer.score_token_ids

    def broken(rows):
        if any(list(row) == poison for row in rows):
            raise RuntimeError("boom")
        return real(rows)

    local._scorer.score_token_ids = broken
    poison = scorer.tokenizer("xyz<|im_end|>")["input_ids"]
    with local._scoring, ThreadPoolExecutor(2) as pool:  # both wait, so they share a batch
        bad, good = pool.submit(local, ["xyz"]), pool.submit(local, [text])
        while len(local._waiting) < 2:
            pass
        local._scoring.release()
        try:
            with pytest.raises(Exception, match=r"queries\[0\]: boom"):
                bad.result(30)
            assert good.result(30)["rewards"] == pytest.approx(
                scorer.score(talks[:1]).item(), rel=1e-4
            )
        finally:
            local._scoring.acquire()


def test_openrlhf_without_a_setting_says_which():
    with pytest.raises(ValueError, match=r"set SARM_URL .* or SARM_MODEL"):
        openrlhf.reward_func(["x"])


# ---- verl ----------------------------------------------------------------------------------


def test_verl_compute_score(serve, scorer, talks, monkeypatch):
    monkeypatch.setenv("SARM_URL", serve().url)
    module = load_file(EXAMPLES / "verl_reward.py")
    want = scorer.score(talks[:1]).item()
    messages = np.array(talks[0][:1], dtype=object)  # as parquet gives it back
    call = {"data_source": "d", "solution_str": talks[0][1]["content"], "ground_truth": None}
    for prompt in (talks[0][0]["content"], messages):
        done = module.compute_score(**call, extra_info={"prompt": prompt, "num_turns": 1})
        assert done == {"score": pytest.approx(want, rel=1e-5)}
    done = asyncio.run(module.compute_score_async(**call, extra_info={"prompt": messages}))
    assert done["score"] == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match="extra_info holds no `prompt`"):
        module.compute_score(**call, extra_info={})


@pytest.fixture
def fake_verl(monkeypatch):
    """The part of verl that the manager stands on."""
    base = types.ModuleType("verl.experimental.reward_loop.reward_manager.base")

    class RewardManagerBase:
        def __init__(self, config, tokenizer, compute_score=None):
            self.config, self.tokenizer = config, tokenizer

    base.RewardManagerBase = RewardManagerBase
    parts = base.__name__.split(".")
    for n in range(1, len(parts)):
        name = ".".join(parts[:n])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    verl._manager.cache_clear()
    yield
    verl._manager.cache_clear()


class Data(list):
    """Slicing and indexing as verl's DataProto."""

    def __getitem__(self, at):
        found = super().__getitem__(at)
        return Data(found) if isinstance(at, slice) else found


def test_verl_reward_manager_scores_the_raw_prompt(fake_verl, serve, scorer, talks, monkeypatch):
    monkeypatch.setenv("SARM_URL", serve().url)
    manager = load_file(EXAMPLES / "verl_reward.py").SarmRewardManager({}, scorer.tokenizer)
    answer = scorer.tokenizer(talks[0][1]["content"])["input_ids"]
    padded = torch.tensor([*answer, scorer.tokenizer.eos_token_id, 0, 0])
    mask = torch.tensor([0, 1, 1] + [1] * (len(answer) + 1) + [0, 0])
    item = types.SimpleNamespace(
        batch={"responses": padded, "attention_mask": mask},
        non_tensor_batch={"raw_prompt": np.array(talks[0][:1], dtype=object)},
    )
    done = asyncio.run(manager.run_single(Data([item])))
    assert done["reward_score"] == pytest.approx(scorer.score(talks[:1]).item(), rel=1e-5)
    assert done["reward_extra_info"] == {"sarm_reward": done["reward_score"]}
    item.non_tensor_batch = {}
    with pytest.raises(ValueError, match=r"data\.return_raw_chat=True"):
        asyncio.run(manager.run_single(Data([item])))


def test_verl_missing_is_an_import_error_that_says_so():
    verl._manager.cache_clear()
    with pytest.raises(ImportError, match="SarmRewardManager needs verl"):
        verl.SarmRewardManager  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        verl.other  # noqa: B018
