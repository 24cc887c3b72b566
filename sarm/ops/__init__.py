"""The primitives that sarm is built from, registered as torch.ops.sarm.*.

    topk_encode(x, w_enc, b_enc, k)        the k largest pre-activations of every token
    sparse_value(vals, idx, w_head)        rewards: P linear heads over the k active latents
    gather_sum(vals, idx, w)               decode
    gather_dot(y, idx, w)                  products with the active latents only
    scatter_outer(a, idx, y, n_latents)    weight gradients, grouped by latent

and of the 8-bit backbone, for inference:

    quantize_rows(x)                       int8 rows with one scale each
    rmsnorm_quantize(x, weight, eps)       the same of the normalised rows
    silu_mul_quantize(gate_up, hadamard)   the same of the gated rows
    int8_linear(q, scale, w_q, w_scale)    a linear layer summed in integers: batch-invariant

Each has a fake kernel (torch.compile) and several backends with one contract
(`sarm.ops.dispatch`); the sparse ones have autograd in terms of each other.
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
from sarm.ops.int8_linear import int8_linear
from sarm.ops.quantize_rows import QuantizedRows, quantize_rows
from sarm.ops.rmsnorm_quantize import rmsnorm_quantize
from sarm.ops.scatter_outer import scatter_outer
from sarm.ops.silu_mul_quantize import silu_mul_quantize
from sarm.ops.sparse_value import sparse_value
from sarm.ops.topk_encode import SparseLatents, topk_encode

__all__ = [
    "BackendStatus",
    "BackendUnavailableError",
    "QuantizedRows",
    "SparseLatents",
    "available_backends",
    "backend_status",
    "gather_dot",
    "gather_sum",
    "int8_linear",
    "quantize_rows",
    "rmsnorm_quantize",
    "scatter_outer",
    "silu_mul_quantize",
    "sparse_value",
    "topk_encode",
    "use_backend",
]
