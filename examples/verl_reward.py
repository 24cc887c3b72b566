"""A SARM as verl's reward, over HTTP: verl and sarm pin different versions of transformers.

    sarm serve -m SARM --port 8000
    export SARM_URL=http://127.0.0.1:8000

As a reward function, where the dataset's extra_info holds the `prompt` (a string or messages):

    reward.custom_reward_function.path=examples/verl_reward.py
    reward.custom_reward_function.name=compute_score_async

As a reward manager, which needs no extra column (data.return_raw_chat=True):

    reward.reward_manager.source=importlib
    reward.reward_manager.module.path=examples/verl_reward.py
    reward.reward_manager.name=SarmRewardManager
"""

from sarm.integrations.verl import compute_score, compute_score_async

__all__ = ["compute_score", "compute_score_async"]


def __getattr__(name):
    """The manager's base class is verl's: it is made when verl asks for it."""
    from sarm.integrations import verl

    return getattr(verl, name)
