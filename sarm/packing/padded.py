"""The transformers forward on right-padded rows: for training, and for what cannot be packed.

With causal attention a token never looks to its right, so padding on the right cannot reach a real
token and no mask is needed: PyTorch keeps its fast causal path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that rows x longest <= max_tokens, longest first.

    The longest batch comes first: if memory does not suffice it shows at once. A sequence longer
    than max_tokens is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) ids padded with 0 on the right and (B,) lengths."""
    lengths = torch.tensor([len(r) for r in rows], dtype=torch.long)
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids.to(device), lengths.to(device)


def last_state(backbone, ids: Tensor, lengths: Tensor) -> Tensor:
    """(B, d_model) residual stream at the last real token of right-padded ids (B, T)."""
    if len(ids) == 0:  # transformers' attention cannot reshape an empty batch
        return torch.empty(0, backbone.config.hidden_size, dtype=backbone.dtype, device=ids.device)
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(ids), device=ids.device), lengths - 1]


def iter_padded(
    backbone, rows: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields (indices, states) of batches with at most `max_tokens` padded tokens."""
    for batch in plan_batches([len(row) for row in rows], max_tokens):
        ids, lengths = pad_right([rows[i] for i in batch], backbone.device)
        with torch.inference_mode():
            yield batch, last_state(backbone, ids, lengths)
