"""The scored token in 8 bits: what rounding does to it in every conversation, taken off.

A scored token is always the same token, so its states share a large constant part, and what
rounding makes of that is the same in every conversation: on SmolLM2 cut at 15 layers half of the
squared error. A few short conversations pass the decoder in fp32 and in 8 bits, and the mean
difference is added to such states from then on (bias correction: arXiv 1906.04721, 1906.03193). The
files are read twice for it, a layer at a time; a checkpoint saved in 8 bits has the result inside.
The mean's last bits depend on the machine's fp32 products: where several machines have to agree in
every bit, save once.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from sarm.backbone import load_tokenizer
from sarm.errors import InputError
from sarm.packing import last_states
from sarm.packing.blocks import unpackable
from sarm.quantization import Int8Decoder
from sarm.quantization.loading import quantize_while_reading
from sarm.tokens import ConversationEncoder
from sarm.weights import WeightSource, read_checked

#: Short ones are enough: of SmolLM2's error 0.0123 is left by 16 of them (1,500 tokens) as well as
#: by 32, and 0.0121 by 128 of any length.
CONVERSATIONS = 32
#: Tokens a pass; every layer is then read once.
ONE_PASS = 1 << 20
_MAX_LENGTH = 512


def rows_for(
    path_or_id: str | os.PathLike,
    vocab_size: int,
    revision: str | None = None,
    gguf_file: str | None = None,
) -> list[list[int]]:
    """The `calibration_rows` of a checkpoint; [] if it has no usable tokenizer."""
    try:
        tokenizer = load_tokenizer(path_or_id, revision=revision, gguf_file=gguf_file)
    except (InputError, FileNotFoundError):
        return []
    return calibration_rows(tokenizer, vocab_size)


def calibration_rows(tokenizer, vocab_size: int) -> list[list[int]]:
    """Token ids of the demo's shortest conversations in a tokenizer's chat template.

    [] where it has none or has more tokens than the model: nothing says which one will be scored.
    """
    try:
        encoder = ConversationEncoder(tokenizer, _MAX_LENGTH)
        rows = [encoded.ids for encoded in encoder.encode(_conversations())]
    except InputError:
        return []
    return rows if all(max(row) < vocab_size for row in rows) else []


def _conversations() -> list[list[dict]]:
    lines = (files("sarm.demo") / "pairs.jsonl").read_text("utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    talks = [pair["prompt"] + pair[side] for pair in pairs for side in ("chosen", "rejected")]
    return sorted(talks, key=lambda talk: sum(len(m["content"]) for m in talk))[:CONVERSATIONS]


def quantize_checkpoint(
    skeleton: Any,
    source: WeightSource,
    prefix: str,
    dtype: torch.dtype,
    device: torch.device,
    rows: Sequence[Sequence[int]],
) -> Int8Decoder:
    """`quantize_while_reading`, calibrated on token sequences; none: not calibrated."""
    if not rows or unpackable(skeleton):  # a streamed decoder has no forward of its own
        return quantize_while_reading(skeleton, source, prefix, dtype, device)
    exact = last_states(_Streamed(skeleton, source, prefix, device), rows, ONE_PASS)
    decoder = quantize_while_reading(skeleton, source, prefix, dtype, device)
    calibrate(decoder, rows, exact)
    return decoder


def calibrate(decoder: Int8Decoder, rows: Sequence[Sequence[int]], exact: Tensor) -> None:
    """Give the last tokens of the rows 16-bit activations, and their states an offset.

    Args:
        rows: token ids of conversations as they will be scored.
        exact: (N, d_model) fp32 states of their last tokens, not quantised.
    """
    last = torch.tensor([row[-1] for row in rows])
    ids = [token for token, _ in Counter(last.tolist()).most_common()]
    decoder.set_scored(ids)
    difference = exact - last_states(decoder, rows)
    decoder.set_scored(ids, torch.stack([difference[last == token].mean(0) for token in ids]))


class _Streamed:
    """A decoder for one packed pass, whose layers are read when their turn comes, in fp32."""

    dtype = torch.float32

    def __init__(
        self, skeleton: Any, source: WeightSource, prefix: str, device: torch.device
    ) -> None:
        self.config, self.device, self.norm = skeleton.config, device, nn.Identity()
        self.rotary_emb = copy.deepcopy(skeleton.rotary_emb).to(device)
        self.layers = _Layers(skeleton.layers, source, prefix, device)
        like = skeleton.embed_tokens.weight
        self._embedding = read_checked(source, f"{prefix}embed_tokens.weight", like, device=device)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return self._embedding[ids].float()


class _Layers(Sequence):
    """Layer i as a module; memory holds one at a time."""

    def __init__(
        self, skeletons: Any, source: WeightSource, prefix: str, device: torch.device
    ) -> None:
        self._skeletons, self._source = skeletons, source
        self._prefix, self._device = prefix, device
        self._held: tuple[int, nn.Module | None] = (-1, None)

    def __len__(self) -> int:
        return len(self._skeletons)

    def __getitem__(self, i):
        if self._held[0] != i:
            self._held = (-1, None)  # before the next one is read
            self._held = (i, self._read(i))
        return self._held[1]

    def _read(self, i: int) -> nn.Module:
        layer = copy.deepcopy(self._skeletons[i])
        state = {
            name: read_checked(
                self._source,
                f"{self._prefix}layers.{i}.{name}",
                like,
                dtype=torch.float32,
                device=self._device,
            )
            for name, like in layer.state_dict().items()
        }
        layer.load_state_dict(state, assign=True)
        return layer.eval()
