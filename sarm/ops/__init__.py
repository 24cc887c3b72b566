"""The five sparse primitives that sarm is built from, registered as torch.ops.sarm.*.

    topk_encode(x, w_enc, b_enc, k)        the k largest pre-activations of every token
    sparse_value(vals, idx, w_head)        rewards: P linear heads over the k active latents
    gather_sum(vals, idx, w)               decode
    gather_dot(y, idx, w)                  products with the active latents only
    scatter_outer(a, idx, y, n_latents)    weight gradients, grouped by latent

Each has a fake kernel (torch.compile), autograd in terms of the others, and several backends
with one contract (`sarm.ops.dispatch`).
"""

from sarm.ops.dispatch import (
    BackendStatus,
    BackendUnavailableError,
    available_backends,
    backend_status,
    use_backend,
)
from sarm.ops.gather_dot import gather_dot
from sarm.ops.gather_sum import gather_sum
from sarm.ops.scatter_outer import scatter_outer
from sarm.ops.sparse_value import sparse_value
from sarm.ops.topk_encode import SparseLatents, topk_encode

__all__ = [
    "BackendStatus",
    "BackendUnavailableError",
    "SparseLatents",
    "available_backends",
    "backend_status",
    "gather_dot",
    "gather_sum",
    "scatter_outer",
    "sparse_value",
    "topk_encode",
    "use_backend",
]
