"""Cuts a prefix tree into forward passes of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sarm.packing.tree import Node

if TYPE_CHECKING:
    from sarm.packing.prefix_cache import Past, Wish

#: Cached tokens that a pass may attend to, for each of its own. A layer's keys and values lie in
#: one buffer while it runs: 4 x 4,096 tokens of Llama-3-8B (G D = 1,024) are 134 MB in fp32.
PAST_PER_TOKEN = 4


@dataclass(eq=False)
class Piece:
    """Consecutive tokens of one node that pass the backbone together.

    parent: the piece before it on its path (perhaps of an earlier pass).  start: position of its
    first token.  rows: the sequences that end with it.  past, wish: see `Node`.  wanted: position
    of the first token whose state is wanted, perhaps beyond the piece; None: of the last token of
    a piece that ends sequences.
    """

    parent: Piece | None
    tokens: Sequence[int]
    start: int
    rows: tuple[int, ...]
    past: Past | None = None
    wish: Wish | None = None
    wanted: int | None = None

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.start + len(self.tokens)

    @property
    def first_wanted(self) -> int:
        """Position of its first token whose state is wanted; `end` where there is none."""
        if self.wanted is None:
            return self.end - 1 if self.rows else self.end
        return min(max(self.wanted, self.start), self.end)

    def path(self) -> Iterator[Piece]:
        """This piece, the one before it, and so on to the root."""
        piece: Piece | None = self
        while piece is not None:
            yield piece
            piece = piece.parent


@dataclass
class Pass:
    """Pieces that run together; a parent stands before its children.

    tokens: of its pieces.  past: cached ones that they attend to.
    """

    pieces: list[Piece] = field(default_factory=list)
    tokens: int = 0
    past: int = 0

    def halves(self) -> tuple[Pass, Pass] | None:
        """Two passes that do the work of this one; None for a single token.

        A piece that lies across the cut gives its first part to a new piece before it, so that
        whoever continues it still does.
        """
        if self.tokens < 2:
            return None
        room = self.tokens // 2
        first, second = Pass(), Pass()
        for piece in self.pieces:
            if room and len(piece.tokens) > room:
                head = Piece(piece.parent, piece.tokens[:room], piece.start, (), piece.past)
                head.wanted = piece.wanted
                piece.parent, piece.past = head, None
                piece.tokens, piece.start = piece.tokens[room:], piece.start + room
                first.add(head)
                room = 0
            into = first if room else second
            into.add(piece)
            room -= min(room, len(piece.tokens))
        return first, second

    def add(self, piece: Piece) -> None:
        """One more piece."""
        self.pieces.append(piece)
        self.tokens += len(piece.tokens)
        self.past += len(piece.past) if piece.past else 0


def plan_passes(nodes: Sequence[Node], max_tokens: int) -> list[Pass]:
    """Every token of the tree in one pass of at most `max_tokens`, longest sequences first.

    A subtree that fits into a pass is never cut. Of a larger one the shared run goes first, alone
    or in parts, and its keys and values are kept for the passes that follow: to keep them costs
    memory for one path from a root at a time (the passes are in depth-first order), to compute
    them again would cost a forward pass over the path in each of them.
    """
    size = [len(node) for node in nodes]
    reach = [node.end for node in nodes]  # length of the longest sequence below
    after = [i + 1 for i in range(len(nodes))]  # where the subtree ends
    children: list[list[int]] = [[] for _ in nodes]
    roots: list[int] = []
    for i in reversed(range(len(nodes))):
        up = nodes[i].parent
        (roots if up < 0 else children[up]).append(i)
        if up >= 0:
            size[up] += size[i]
            reach[up] = max(reach[up], reach[i])
            after[up] = max(after[up], after[i])
    passes: list[Pass] = []
    last: dict[int, Piece] = {}  # the last piece of a node

    def room_for(tokens: int, past: Past | None) -> Pass:
        cached = len(past) if past else 0
        if (
            not passes
            or passes[-1].tokens + tokens > max_tokens
            or (cached and passes[-1].past + cached > PAST_PER_TOKEN * max_tokens)
        ):
            passes.append(Pass())
        return passes[-1]

    def add(i: int, start: int, end: int, into: Pass) -> None:
        node = nodes[i]
        parent = last.get(i) or last.get(node.parent)
        whole = end == node.end
        piece = Piece(parent, node.source[start:end], start, node.rows if whole else ())
        piece.past = None if parent else node.past
        piece.wish = node.wish if whole else None
        into.add(piece)
        last[i] = piece

    def longest_last(these: list[int]) -> list[int]:  # the end of a stack comes first
        return sorted(these, key=lambda i: (reach[i], -i))

    stack = longest_last(roots)
    while stack:
        i = stack.pop()
        if size[i] <= max_tokens:
            into = room_for(size[i], nodes[i].past)
            for j in range(i, after[i]):
                add(j, nodes[j].start, nodes[j].end, into)
            continue
        for start in range(nodes[i].start, nodes[i].end, max_tokens):
            end = min(start + max_tokens, nodes[i].end)
            add(i, start, end, room_for(end - start, nodes[i].past))
        stack += longest_last(children[i])
    return passes
