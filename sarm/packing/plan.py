"""Cuts a prefix tree into forward passes of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sarm.packing.tree import Node


@dataclass(eq=False)
class Piece:
    """Consecutive tokens of one node that pass the backbone together.

    parent: the piece before it on its path (perhaps of an earlier pass).  start: position of its
    first token.  rows: the sequences that end with it.  last_use: number of the last pass that
    attends to it.
    """

    parent: Piece | None
    tokens: Sequence[int]
    start: int
    rows: tuple[int, ...]
    last_use: int


@dataclass
class Pass:
    """Pieces that run together; a parent stands before its children."""

    number: int
    pieces: list[Piece] = field(default_factory=list)
    tokens: int = 0


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

    def room_for(tokens: int) -> Pass:
        if not passes or passes[-1].tokens + tokens > max_tokens:
            passes.append(Pass(len(passes)))
        return passes[-1]

    def add(i: int, start: int, end: int, into: Pass) -> None:
        node = nodes[i]
        parent = last.get(i) or last.get(node.parent)
        rows = node.rows if end == node.end else ()
        piece = Piece(parent, node.source[start:end], start, rows, into.number)
        into.pieces.append(piece)
        into.tokens += end - start
        last[i] = piece
        while parent is not None and parent.last_use < into.number:
            parent.last_use = into.number
            parent = parent.parent

    def longest_last(these: list[int]) -> list[int]:  # the end of a stack comes first
        return sorted(these, key=lambda i: (reach[i], -i))

    stack = longest_last(roots)
    while stack:
        i = stack.pop()
        if size[i] <= max_tokens:
            into = room_for(size[i])
            for j in range(i, after[i]):
                add(j, nodes[j].start, nodes[j].end, into)
            continue
        for start in range(nodes[i].start, nodes[i].end, max_tokens):
            end = min(start + max_tokens, nodes[i].end)
            add(i, start, end, room_for(end - start))
        stack += longest_last(children[i])
    return passes
