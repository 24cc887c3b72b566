"""The forward pass of a Llama-like decoder over a packed prefix tree.

The decoder's layers are called on (T, d_model) matrices (`sarm.packing.blocks`); only what mixes
tokens is ours. In the last kept layer every token gives a key and a value, but queries, output
projection and MLP run for the scored tokens only.

    T  tokens of the pass    P  tokens of earlier passes that it attends to    S = P + T
    H  query heads    G  key heads    D  head width
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sarm.attention import Spans, attention, has_kernels, joined
from sarm.packing.blocks import blocks_of
from sarm.packing.plan import Pass, Piece
from sarm.packing.prefix_cache import KeyValue, Past, Wish

#: Tokens that go through a layer's linears together on a CPU: what lies between two GEMMs stays in
#: the cache, and a GEMM of this height runs at full speed.
CHUNK = 1024


class PackedDecoder:
    """Runs passes in order, keeping the keys and values that later passes attend to.

    Passes come depth-first: what any later one attends to stands before the next one's first piece.
    """

    def __init__(self, backbone) -> None:
        self.device = backbone.device
        self.blocks = blocks_of(backbone)
        self._kept: dict[Piece, KeyValue] = {}

    @torch.inference_mode()
    def run(self, batch: Pass, after: Pass | None = None) -> tuple[list[Piece], Tensor]:
        """The pieces of the pass with wanted tokens, and those tokens' (n, d_model) states.

        By default the pieces that end sequences, with one state each, that of their last token.

        after: the pass that will run next.  If this one fails, it may be tried again.
        """
        blocks, layout = self.blocks, Layout(batch, self._kept)
        ahead = set(after.pieces[0].path()) if after else set()
        fresh: dict[Piece, KeyValue] = {p: [] for p in batch.pieces if p in ahead}
        wishes: list[tuple[Piece, Wish, KeyValue]] = [
            (p, p.wish, []) for p in batch.pieces if p.wish and p.wish.granted()
        ]
        saves = [(stored, [layout.own(p)]) for p, stored in fresh.items()]
        saves += [(stored, layout.ranges(p, w.start, w.end)) for p, w, stored in wishes]
        hidden = blocks.embed(layout.ids.to(self.device))
        fine = self._fine_rows(layout.ids)
        rope = blocks.rope(layout.positions.to(self.device), hidden)
        for i in range(len(blocks)):
            last = i == len(blocks) - 1
            q, k, v = self._inputs(i, hidden, rope, layout, fine, queries=not last)
            for stored, ranges in saves:
                stored.append((copied(k, ranges), copied(v, ranges)))
            if last:
                scored = layout.scored.to(self.device)
                hidden = hidden[scored]
                fine = self._fine_rows(layout.ids[layout.scored])
                q = self._queries(i, hidden, (rope[0][scored], rope[1][scored]), fine)
            mixed = attention(
                q,
                k,
                v,
                layout.scored_spans if last else layout.spans,
                scale=blocks.scale,
                window=blocks.windows[i],
                softcap=blocks.softcap,
            ).flatten(1)
            some = None if fine is None else hidden[fine]
            for part in chunks(hidden):
                blocks.finish(i, hidden[part], mixed[part], fine=False)
            if fine is not None and some is not None:
                blocks.finish(i, some, mixed[fine], fine=True)
                hidden[fine] = some
        states = blocks.restore(hidden, layout.ids[layout.scored])
        self._kept = {p: stored for p, stored in self._kept.items() if p in ahead} | fresh
        for _, wish, stored in wishes:
            wish.fulfil(stored)
        return layout.ending, states

    def _fine_rows(self, ids: Tensor) -> Tensor | None:
        rows = self.blocks.fine_rows(ids)
        return None if rows is None else rows.to(self.device)

    def _inputs(
        self,
        i: int,
        hidden: Tensor,
        rope,
        layout: Layout,
        fine: Tensor | None,
        *,
        queries: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (T, H, D), empty unless asked for, and k, v (S, G, D): kept ones, then the pass's."""
        blocks, past = self.blocks, layout.past
        q = self._empty(len(hidden) if queries else 0, blocks.query_heads)
        k, v = (self._empty(past + len(hidden), blocks.key_heads) for _ in range(2))
        for rows, stored, part in layout.stored:
            k[rows], v[rows] = (t[part] for t in stored[i])
        for part in chunks(hidden):
            if queries:
                q_part, k_part, v_part = blocks.queries_keys_values(i, hidden[part], fine=False)
                rotate(q_part, rope, part, out=q[part])
            else:
                k_part, v_part = blocks.keys_and_values(i, hidden[part], fine=False)
            rotate(k_part, rope, part, out=k[past:][part])
            v[past:][part] = v_part
        if fine is not None:
            own = (rope[0][fine], rope[1][fine])
            if queries:
                some, k_some, v_some = blocks.queries_keys_values(i, hidden[fine], fine=True)
                q[fine] = rotated(some, own)
            else:
                k_some, v_some = blocks.keys_and_values(i, hidden[fine], fine=True)
            k[past + fine], v[past + fine] = rotated(k_some, own), v_some
        return q, k, v

    def _queries(self, i: int, hidden: Tensor, rope, fine: Tensor | None) -> Tensor:
        """(rows, H, D)."""
        q = self._empty(len(hidden), self.blocks.query_heads)
        for part in chunks(hidden):
            rotate(self.blocks.queries(i, hidden[part], fine=False), rope, part, out=q[part])
        if fine is not None:
            some = self.blocks.queries(i, hidden[fine], fine=True)
            q[fine] = rotated(some, (rope[0][fine], rope[1][fine]))
        return q

    def _empty(self, rows: int, heads: int) -> Tensor:
        shape = (rows, heads, self.blocks.head_dim)
        return torch.empty(shape, dtype=self.blocks.dtype, device=self.device)


class Layout:
    """Where everything of a pass lies: what is cached, kept pieces, its own, one after another.

    ids, positions: (T,).  past: P.  stored: the keys that stand before the pass's own, as (rows,
    keys and values, rows of these).  ending: pieces with wanted tokens, the last ones of those that
    end sequences unless they say otherwise; scored: (n,) rows of these tokens in (T,).
    """

    def __init__(self, batch: Pass, kept: Mapping[Piece, KeyValue]) -> None:
        self._first: dict[Piece, int] = {}
        self.stored: list[tuple[slice, KeyValue, slice]] = []
        ranges: dict[Piece, list[tuple[int, int]]] = {}  # of the keys up to the piece's end
        cached: dict[Past, list[tuple[int, int]]] = {}
        row = 0
        for past in [p.past for p in (*kept, *batch.pieces) if p.past]:
            if past in cached:
                continue
            cached[past] = [(row, len(past))]
            for stored, part in past.parts:
                self.stored.append((slice(row, row + part.stop - part.start), stored, part))
                row += part.stop - part.start
        for piece in (*kept, *batch.pieces):  # a parent stands before its children
            before = cached[piece.past] if piece.past else []
            before = ranges[piece.parent] if piece.parent else before
            self._first[piece] = row
            ranges[piece] = joined(before, row, len(piece.tokens))
            if piece in kept:
                self.stored.append((slice(row, row + len(piece.tokens)), kept[piece], slice(None)))
            row += len(piece.tokens)
        self._ranges = ranges
        self.past = row - batch.tokens
        own = batch.pieces
        self.ids = torch.tensor([t for p in own for t in p.tokens], dtype=torch.long)
        self.positions = torch.cat([torch.arange(p.start, p.start + len(p.tokens)) for p in own])
        self.ending = [p for p in own if p.first_wanted < p.end]
        self.spans = Spans.of(
            [(self._first[p] - self.past, len(p.tokens), p.start, ranges[p]) for p in own]
        )
        rows: list[int] = []
        runs, count = [], 0
        for p in self.ending:
            wanted, first = p.end - p.first_wanted, self._first[p] - self.past
            rows += range(first + len(p.tokens) - wanted, first + len(p.tokens))
            runs.append((count, wanted, p.first_wanted, ranges[p]))
            count += wanted
        self.scored = torch.tensor(rows, dtype=torch.long)
        self.scored_spans = Spans.of(runs)

    def own(self, piece: Piece) -> tuple[int, int]:
        """First row and count of its keys."""
        return self._first[piece], len(piece.tokens)

    def ranges(self, piece: Piece, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        """Where the keys of positions [start, end) of its sequence lie: (first row, count)."""
        end = piece.start + len(piece.tokens) if end is None else end
        found, position = [], 0
        for first, count in self._ranges[piece]:
            low, high = max(start - position, 0), min(end - position, count)
            if low < high:
                found.append((first + low, high - low))
            position += count
        return found


def copied(t: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Rows of t, in memory of their own."""
    return torch.cat([t[first : first + count] for first, count in ranges])


def chunks(hidden: Tensor) -> Iterator[slice]:
    """Slices of the rows; a GPU takes them all at once."""
    size = CHUNK if hidden.device.type == "cpu" else max(1, len(hidden))
    for start in range(0, len(hidden), size):
        yield slice(start, min(start + size, len(hidden)))


def rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """`rotate` of all rows, in memory of its own."""
    out = torch.empty_like(x)
    rotate(x, rope, slice(None), out=out)
    return out


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], part: slice, *, out: Tensor) -> None:
    """Rotary embedding of x (rows, heads, D) with cos and sin (T, D / 2).

    An element's bits depend on its own operands only. In PyTorch every product and sum is rounded
    on its own: a fused multiply-add may be used in a vectorised loop and not in its rest.
    """
    cos, sin = (table[part] for table in rope)
    if x.device.type == "cpu" and x.dtype == out.dtype == torch.float32 and has_kernels():
        torch.ops.sarm_cpu.rotary(x, cos, sin, out)
        return
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    torch.sub(a * cos, b * sin, out=out[..., :half])
    torch.add(b * cos, a * sin, out=out[..., half:])
