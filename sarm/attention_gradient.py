"""The gradient of packed attention: scores are computed again, a block of queries at a time.

    G  key heads    R  query heads of each    D  head width    n  queries of a block
    m  keys up to the block's last query: what lies behind is never computed

    S = scale q k^T + mask        P = softmax(S)        out = P v
    d_v = P^T d_out               d_P = d_out v^T       d_S = P * (d_P - rowsum(d_P * P))
    d_q = scale d_S k             d_k = scale d_S^T q

A block's S is (G, n R, m). Nothing of it is kept from the forward pass, which may be any kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sarm.attention import Spans

#: Rows n R of a block. Larger ones compute more of what the mask hides: 128, 384 and 768 rows take
#: 52, 68 and 97 ms for 1,500 tokens of 9 heads of width 64 (one core of a 2.6 GHz Emerald Rapids);
#: the backward pass of scaled_dot_product_attention takes 61 ms.
BLOCK_ROWS = 128


def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    spans: Spans,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_q (T, H, D), d_k and d_v (S, G, D) of `attention`'s arguments, for d_out (T, H, D)."""
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    (_, heads, width), groups = q.shape, k.shape[1]
    repeats = heads // groups
    block = max(1, BLOCK_ROWS // repeats)

    def by_group(rows: Tensor) -> Tensor:
        """(n, H, D) -> (G, n R, D)."""
        grouped = rows.unflatten(1, (groups, repeats)).transpose(0, 1)
        return grouped.reshape(groups, -1, width)

    for first, count, position, begin, many in spans.queries.tolist():
        ranges = spans.ranges[begin : begin + many].tolist()
        own = torch.cat([torch.arange(row, row + n, device=q.device) for row, n in ranges])
        own = own[: position + count]
        keys, values = (t[own].transpose(0, 1).contiguous() for t in (k, v))
        d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
        for start in range(0, count, block):
            n = min(block, count - start)
            m = position + start + n
            rows = slice(first + start, first + start + n)
            query, d_mixed = by_group(q[rows]) * scale, by_group(d_out[rows])
            scores = query @ keys[:, :m].transpose(1, 2)
            if softcap is not None:
                bent = torch.tanh(scores.div_(softcap))
                scores = bent * softcap
            seen = n if window is None else m  # of the keys before, a window hides some
            mask = spans.mask(seen - n, n, window, q.dtype, q.device)
            scores.unflatten(1, (n, repeats))[..., m - seen :] += mask[:, None]
            weights = scores.softmax(-1)
            d_values[:, :m].baddbmm_(weights.transpose(1, 2), d_mixed)
            d_scores = torch.ops.aten._softmax_backward_data(
                d_mixed @ values[:, :m].transpose(1, 2), weights, -1, weights.dtype
            )
            if softcap is not None:
                d_scores.addcmul_(d_scores * bent, bent, value=-1)
            d_query = (d_scores @ keys[:, :m]).mul_(scale).unflatten(1, (n, repeats))
            d_q[rows] = d_query.transpose(0, 1).flatten(1, 2)
            d_keys[:, :m].baddbmm_(d_scores.transpose(1, 2), query)
        d_k.index_add_(0, own, d_keys.transpose(0, 1))
        d_v.index_add_(0, own, d_values.transpose(0, 1))
    return d_q, d_k, d_v
