"""8-bit decoders from checkpoints: quantised while they are read, or saved so and read back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sarm.quantization.int8 import Int8Decoder, quantize_backbone
from sarm.quantization.layer import check_supported
from sarm.weights import WeightSource, read_checked


def quantize_while_reading(
    skeleton: Any, source: WeightSource, prefix: str, dtype: torch.dtype, device: torch.device
) -> Int8Decoder:
    """Layer by layer: memory never holds more than one linear in floating point.

    Args:
        skeleton: the cut transformers decoder, parameters on the meta device.
        source, prefix: where its tensors are, and what stands before their names.
        dtype: of q, k, v, attention and the embedding.
    Raises:
        InputError: an architecture that cannot be rotated; tensors as in `read_checked`.
    """
    check_supported(skeleton.config)

    def read(name: str, like: Tensor) -> Tensor:
        return read_checked(source, prefix + name, like, device=device)

    decoder = Int8Decoder(
        copy.deepcopy(skeleton.config),
        copy.deepcopy(skeleton.rotary_emb).to(device),
        read("embed_tokens.weight", skeleton.embed_tokens.weight),
        dtype=dtype,
    )
    for i, layer in enumerate(skeleton.layers):
        decoder.add_layer(_OnDemand(f"layers.{i}.", layer.state_dict(), read))
    return decoder.eval()


class _OnDemand(Mapping):
    """A layer's tensors, each read when it is taken: memory holds one matrix at a time."""

    def __init__(
        self, prefix: str, likes: dict[str, Tensor], read: Callable[[str, Tensor], Tensor]
    ) -> None:
        self._prefix, self._likes, self._read = prefix, likes, read
        self._vectors: dict[str, Tensor] = {}  # a norm's gain is taken by each of its readers

    def __getitem__(self, name: str) -> Tensor:
        if name in self._vectors:
            return self._vectors[name]
        tensor = self._read(self._prefix + name, self._likes[name])
        if tensor.ndim == 1:
            self._vectors[name] = tensor
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._likes)

    def __len__(self) -> int:
        return len(self._likes)


def read_quantized(
    skeleton: Any, source: WeightSource, prefix: str, dtype: torch.dtype, device: torch.device
) -> Int8Decoder:
    """A decoder that was saved in 8 bits; arguments and errors as in `quantize_while_reading`."""
    decoder = quantize_backbone(skeleton, dtype=dtype)  # shapes alone: on the meta device
    scored = f"{prefix}scored_ids"
    count = source.read(scored).numel() if scored in source.names() else 0
    decoder.set_scored([0] * count)  # as many as there are
    state = {
        name: read_checked(source, prefix + name, like, dtype=like.dtype, device=device)
        for name, like in decoder.state_dict().items()
    }
    decoder.load_state_dict(state, assign=True)
    decoder = decoder.to(device)
    decoder.set_scored(decoder.scored_ids.tolist(), decoder.offsets)
    return decoder.eval()
