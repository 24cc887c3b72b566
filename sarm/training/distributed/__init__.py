"""Training over several processes, started by `torchrun` or `accelerate launch`.

world.py        the processes as a grid of data x latents, and what they tell each other
sharded_sae.py  a TopK SAE whose latents are spread over processes, with exact top-k
extraction.py   residual states: every process runs its share of the documents
files.py        tensors of all shards into one safetensors file, one after the other
pairs.py        reward models: normalised losses, FSDP2, what only one process may do
"""

from sarm.training.distributed.sharded_sae import ShardedTopKSAE, merged_places
from sarm.training.distributed.world import World

__all__ = ["ShardedTopKSAE", "World", "merged_places"]
