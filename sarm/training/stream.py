"""Residual states of a corpus, in chunks, with every finished piece kept on disk.

A chunk is what the SAE shuffles and learns from at once. It is collected in pieces of a few
thousand states; each piece is a file as soon as it is whole, so a killed run loses seconds of
backbone time, and a resumed one sees exactly the chunks an uninterrupted one would have seen.

Pieces wait on disk, not in memory: what lies in memory is the chunk that is learnt from and, with
prefetch, the next one, 4 * chunk_states * d_model bytes each (and a document more), and a piece.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from sarm.checkpoint import read_metadata, replace_file
from sarm.packing import iter_last_states, iter_token_states
from sarm.packing.blocks import unpackable
from sarm.sae import normalize_tokens
from sarm.states import StateCache
from sarm.training.activations import SCORED, Window, prefixes, window_states
from sarm.training.prefetch import prefetch

PIECE = 4096  # states in a file


@dataclass(frozen=True)
class Chunk:
    """(n, d_model) fp32 normalised states, and how far in the corpus they reach.

    kinds: (n,) uint8, what each state is, indices of `activations.POSITIONS`.
    """

    states: Tensor
    kinds: Tensor
    documents: int  # documents consumed up to the end of this chunk
    tokens: int  # tokens of text run through the backbone for this chunk


@dataclass(frozen=True)
class Corpus:
    """What a run will see: documents, windows' tokens, the states of each chunk.

    scored: how many of the documents are conversations.
    """

    documents: int
    tokens: int
    chunks: list[int]
    scored: int = 0

    @property
    def states(self) -> int:
        """States of all chunks."""
        return sum(self.chunks)


def survey(corpus: Iterable[list[Window]], limit: int | None, chunk_states: int) -> Corpus:
    """Count a corpus (the windows of every document) up to `limit` states."""
    documents = tokens = have = scored = 0
    left = math.inf if limit is None else limit
    chunks: list[int] = []
    for windows in corpus:
        documents += 1
        tokens += sum(len(w.ids) for w in windows)
        have += sum(len(w.positions) for w in windows)
        scored += sum(w.kind == SCORED for w in windows)
        if have >= min(chunk_states, left):
            chunks.append(int(min(have, left)))
            left, have = left - chunks[-1], 0
            if not left:
                break
    return Corpus(documents, tokens, [*chunks, have] if have else chunks, scored)


class StateStream:
    """Chunks of normalised states, in corpus order.

    A chunk ends with the first document that brings it to `chunk_states`.

    Args:
        backbone: the cut decoder.
        end_id: ends a turn, for windows of the kind "turn-end".
        folder: where pieces of the chunks in progress are kept, a folder for each.
        chunk_states: states a chunk holds at least (the last may hold fewer).
        normalization: "token" or "none", as in `TopKSAE`.
        cache: where states of conversations are looked up and kept. A state found there was
            computed in another batch and may differ in its last bits.
        prefetch: collect the next chunk in a thread (see `prefetch`) while the caller is busy with
            one. The chunks have the same bits.
    """

    def __init__(
        self,
        backbone,
        end_id: int | None,
        folder: Path,
        chunk_states: int,
        normalization: str = "token",
        cache: StateCache | None = None,
        *,
        prefetch: bool = False,
    ) -> None:
        self.backbone, self.end_id, self.cache = backbone, end_id, cache
        self.folder, self.chunk_states = Path(folder), chunk_states
        self.normalization, self.prefetch = normalization, prefetch

    def chunks(
        self,
        corpus: Iterable[list[Window]],
        *,
        documents_done: int = 0,
        limit: int | None = None,
        progress: Callable[[int], None] = lambda states: None,
    ) -> Generator[Chunk]:
        """Chunks of the documents after the first `documents_done`, `limit` states at most.

        The corpus is read once, from its beginning. `progress(states)` is called with the states
        collected since the last call; with prefetch in another thread.
        """
        self._keep_only(documents_done)
        collect = functools.partial(self._collect, corpus, documents_done, limit, progress)
        found = prefetch(collect, self.backbone.device) if self.prefetch else collect(lambda: None)
        with contextlib.closing(found):
            for chunk in found:
                yield chunk
                self._remove(self._place(documents_done))
                documents_done = chunk.documents
        self._keep_only(None)

    def _collect(
        self,
        corpus: Iterable[list[Window]],
        start: int,
        limit: int | None,
        progress: Callable[[int], None],
        check: Callable[[], None],
    ) -> Generator[Chunk]:
        """Chunk by chunk, each from the pieces in its folder and those it still lacks.

        `check` may raise after any piece.
        """
        windows, collected = None, 0
        while limit is None or collected < limit:
            left = None if limit is None else limit - collected
            want = self.chunk_states if left is None else min(self.chunk_states, left)
            paths, documents, tokens, have = self._finished_pieces(start)
            progress(have)
            if windows is None:  # go on where the pieces of an interrupted run end
                windows = itertools.islice(corpus, documents, None)
            elif len(paths):
                windows = itertools.islice(windows, documents - start, None)
            while have < want and (piece := self._piece(windows, min(PIECE, want - have))):
                states, kinds, consumed, ran = piece
                documents, tokens = documents + consumed, tokens + ran
                paths.append(self._place(start) / f"piece-{len(paths):05d}.safetensors")
                self._write_piece(paths[-1], states, kinds, documents, tokens)
                have += len(states)
                progress(len(states))
                check()
            if not have:
                return
            yield Chunk(*self._joined(paths, have, left), documents, tokens)
            collected, start = collected + have, documents

    def _place(self, start: int) -> Path:
        """Folder of the pieces of the chunk that begins after `start` documents."""
        return self.folder / f"{start:09d}"

    def _keep_only(self, start: int | None) -> None:
        """Forget pieces of chunks before the one after `start` documents (None: all pieces)."""
        for place in self.folder.glob("*"):
            if start is None or not place.name.isdecimal() or int(place.name) < start:
                self._remove(place)
        if start is None:
            self._remove(self.folder)

    def _remove(self, place: Path) -> None:
        """Delete a folder of pieces."""
        shutil.rmtree(place, ignore_errors=True)

    def _piece(
        self, documents: Iterator[list[Window]], size: int
    ) -> tuple[Tensor, Tensor, int, int] | None:
        """(states, kinds, documents, tokens) of the next documents, `size` states or more."""
        piece: list[Window] = []
        count = consumed = 0
        for windows in documents:
            consumed += 1
            piece += windows
            count += sum(len(window.positions) for window in windows)
            if count >= size:
                break
        if not piece:
            return None
        states = self._states(piece)
        if self.normalization == "token":
            states = normalize_tokens(states)
        labels = [label for window in piece for label in window.labels()]
        kinds = torch.tensor(labels, dtype=torch.uint8)
        return states, kinds, consumed, sum(len(window.ids) for window in piece)

    def _states(self, piece: list[Window]) -> Tensor:
        """(states of all windows, in order, d_model)."""
        parts: list[Tensor] = [torch.empty(0)] * len(piece)
        rows: list[list[int]] = []  # sequences whose last token is read
        owner: list[int] = []  # of each row, its window
        whole: list[int] = []  # windows of which every token is read
        packable = unpackable(self.backbone) is None
        for i, window in enumerate(piece):
            if window.kind == SCORED and self.cache is not None:
                continue
            if window.kind != SCORED and not packable:
                parts[i] = window_states(self.backbone, window, self.end_id)
            elif window.kind == "token":
                whole.append(i)
            else:
                found = prefixes(window, self.end_id)
                rows += found
                owner += [i] * len(found)
        if whole:
            ids = [piece[i].ids for i in whole]
            for j, states in iter_token_states(self.backbone, ids):
                parts[whole[j]] = states[piece[whole[j]].positions]
        if rows:
            states = torch.empty(len(rows), self.backbone.config.hidden_size)
            for indices, some in iter_last_states(self.backbone, rows):
                states[indices] = some
            counts = Counter(owner)
            split = states.split([counts[i] for i in counts])
            for i, part in zip(counts, split, strict=True):
                parts[i] = part
        if self.cache is not None:
            scored = [i for i, window in enumerate(piece) if window.kind == SCORED]
            for i, state in zip(
                scored, self.cache.states([piece[i].ids for i in scored]), strict=True
            ):
                parts[i] = state[None]
        return torch.cat(parts)

    def _write_piece(
        self, path: Path, states: Tensor, kinds: Tensor, documents: int, tokens: int
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"states": states.contiguous(), "kinds": kinds}
        place = {"documents": documents, "tokens": tokens, "states": len(states)}
        with replace_file(path, "wb") as file:
            file.write(save(tensors, {"place": json.dumps(place)}))

    def _finished_pieces(self, start: int) -> tuple[list[Path], int, int, int]:
        """What an interrupted run left of a chunk: (pieces, documents, tokens, states)."""
        paths = sorted(self._place(start).glob("piece-*.safetensors"))
        documents, tokens, have = start, 0, 0
        for path in paths:
            place = json.loads(read_metadata(path)["place"])
            documents, tokens = place["documents"], place["tokens"]
            have += place["states"]
        return paths, documents, tokens, have

    def _joined(self, paths: list[Path], have: int, limit: int | None) -> tuple[Tensor, Tensor]:
        """(states, kinds) of pieces, `limit` at most; one piece at a time lies beside them."""
        states = torch.empty(have, self.backbone.config.hidden_size)
        kinds = torch.empty(have, dtype=torch.uint8)
        at = 0
        for path in paths:
            piece = load_file(path)
            end = at + len(piece["kinds"])
            states[at:end], kinds[at:end] = piece["states"], piece["kinds"]
            at = end
        return states[:limit], kinds[:limit]
