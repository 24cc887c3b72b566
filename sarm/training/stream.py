"""Residual states from text, in chunks, with every finished piece kept on disk.

A chunk is what the SAE shuffles and learns from at once. It is collected in pieces of a few
thousand states; each piece is a file as soon as it is whole, so a killed run loses seconds of
backbone time, and a resumed one sees exactly the chunks an uninterrupted one would have seen.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from sarm.checkpoint import replace_file
from sarm.sae import normalize_tokens
from sarm.training.activations import WindowMaker, window_states

PIECE = 4096  # states in a file


@dataclass(frozen=True)
class Chunk:
    """(n, d_model) fp32 normalised states, and how far in the corpus they reach."""

    states: Tensor
    documents: int  # documents consumed up to the end of this chunk
    tokens: int  # tokens run through the backbone for this chunk


@dataclass(frozen=True)
class Corpus:
    """What a run will see: documents, windows' tokens and states, counted without the backbone."""

    documents: int
    tokens: int
    states: int


def survey(texts: Iterable[str], maker: WindowMaker, limit: int | None) -> Corpus:
    """Count a corpus up to `limit` states; costs a tokenisation."""
    documents = tokens = states = 0
    for windows in maker.windows(texts):
        documents += 1
        tokens += sum(len(w.ids) for w in windows)
        states += sum(len(w.positions) for w in windows)
        if limit is not None and states >= limit:
            break
    return Corpus(documents, tokens, states)


class StateStream:
    """Chunks of at least `chunk_states` normalised states, in corpus order.

    Args:
        backbone, maker: the cut decoder and what cuts documents for it.
        folder: where pieces of the chunk in progress are kept.
        chunk_states: states a chunk holds (the last may hold fewer).
        normalization: "token" or "none", as in `TopKSAE`.
    """

    def __init__(
        self,
        backbone,
        maker: WindowMaker,
        folder: Path,
        chunk_states: int,
        normalization: str = "token",
    ) -> None:
        self.backbone, self.maker = backbone, maker
        self.folder, self.chunk_states = Path(folder), chunk_states
        self.normalization = normalization
        self.end_id = maker.tokenizer.eos_token_id

    def chunks(
        self,
        texts: Iterable[str],
        *,
        documents_done: int = 0,
        limit: int | None = None,
        progress: Callable[[int], None] = lambda states: None,
    ) -> Iterator[Chunk]:
        """Chunks of the texts after the first `documents_done`; stops at `limit` states.

        `progress(states)` is called with the states collected since the last call.
        """
        collected = 0
        while limit is None or collected < limit:
            want = self.chunk_states if limit is None else min(self.chunk_states, limit - collected)
            chunk = self._collect(texts, documents_done, want, progress)
            if chunk is None:
                return
            yield chunk
            collected += len(chunk.states)
            documents_done = chunk.documents
            self.clear()

    def clear(self) -> None:
        """Forget the pieces of the chunk in progress."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _collect(self, texts, start: int, want: int, progress) -> Chunk | None:
        parts, documents, tokens = self._finished_pieces(start)
        have = sum(len(p) for p in parts)
        progress(have)
        if have < want:
            rest = itertools.islice(iter(texts), documents, None)
            for part, consumed, ran in self._pieces(rest):
                documents, tokens = documents + consumed, tokens + ran
                self._write_piece(len(parts), part, start, documents, tokens)
                parts.append(part)
                progress(len(part))
                have += len(part)
                if have >= want:
                    break
        return Chunk(torch.cat(parts), documents, tokens) if have else None

    def _pieces(self, texts: Iterable[str]) -> Iterator[tuple[Tensor, int, int]]:
        """(states, documents consumed, tokens) of about PIECE states each."""
        states, count, documents, tokens = [], 0, 0, 0
        for windows in self.maker.windows(texts):
            documents += 1
            for window in windows:
                part = window_states(self.backbone, window, self.maker.kind, self.end_id)
                states.append(normalize_tokens(part) if self.normalization == "token" else part)
                count += len(part)
                tokens += len(window.ids)
            if count >= PIECE:
                yield torch.cat(states), documents, tokens
                states, count, documents, tokens = [], 0, 0, 0
        if count:
            yield torch.cat(states), documents, tokens

    def _write_piece(self, number: int, part: Tensor, start: int, documents: int, tokens: int):
        place = {"start": start, "documents": documents, "tokens": tokens}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"piece-{number:05d}.safetensors"
        with replace_file(path, "wb") as file:
            file.write(save({"states": part.contiguous()}, {"place": json.dumps(place)}))

    def _finished_pieces(self, start: int) -> tuple[list[Tensor], int, int]:
        """Pieces an interrupted run left of the chunk that begins after `start` documents."""
        parts, documents, tokens = [], start, 0
        for path in sorted(self.folder.glob("piece-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                place = json.loads(file.metadata()["place"])
                if place["start"] != start:  # left by the chunk before, already learnt
                    self.clear()
                    return [], start, 0
                parts.append(file.get_tensor("states"))
                documents, tokens = place["documents"], place["tokens"]
        return parts, documents, tokens
