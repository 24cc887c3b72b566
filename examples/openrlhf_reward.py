"""A SARM as OpenRLHF's reward, from a Python file.

The simplest way needs no file: OpenRLHF speaks to `sarm serve` itself.

    sarm serve -m SARM --port 8000
    ... --reward.remote_url http://127.0.0.1:8000/get_reward

With this file the reward comes from the same server with a bearer token and retries (SARM_URL,
SARM_TOKEN_ENV), or from a scorer inside each rollout process (SARM_MODEL=path):

    SARM_URL=http://127.0.0.1:8000 ... --reward.remote_url examples/openrlhf_reward.py
"""

from sarm.integrations.openrlhf import reward_func

__all__ = ["reward_func"]
