"""A load generator for an HTTP server on this machine: keep-alive clients in one event loop.

Plain asyncio streams, because a client library would take more of the machine than the server's
own parsing does, and both share its cores.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass
class Load:
    """What became of every request: seconds to its answer by status, and those without one."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    bodies: dict[int, bytes] = field(default_factory=dict)  # request -> body of its 200
    lost: list[str] = field(default_factory=list)
    wall: float = 0.0

    def count(self, status: int) -> int:
        return len(self.seconds.get(status, []))


def closed_loop(address: tuple[str, int], path: str, bodies: Sequence[bytes], clients: int) -> Load:
    """`clients` connections take the bodies in turn: each sends its next when it is answered."""
    return asyncio.run(_run(address, path, bodies, clients))


async def _run(address: tuple[str, int], path: str, bodies: Sequence[bytes], clients: int) -> Load:
    load = Load()
    todo = iter(enumerate(bodies))
    start = time.perf_counter()
    await asyncio.gather(*(_client(address, path, todo, load) for _ in range(clients)))
    load.wall = time.perf_counter() - start
    return load


async def _client(
    address: tuple[str, int], path: str, todo: Iterator[tuple[int, bytes]], load: Load
) -> None:
    streams = None
    for i, body in todo:
        start = time.perf_counter()
        try:
            streams = streams or await asyncio.open_connection(*address)
            status, answer, keep = await _post(*streams, path, body)
        except (OSError, EOFError, ValueError) as error:
            load.lost.append(f"request {i}: {type(error).__name__}: {error}")
            streams = None
            continue
        load.seconds.setdefault(status, []).append(time.perf_counter() - start)
        if status == 200:
            load.bodies[i] = answer
        if not keep:
            streams[1].close()
            streams = None
    if streams:
        streams[1].close()


async def _post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: bytes
) -> tuple[int, bytes, bool]:
    """(status, body, whether the connection stays open)."""
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    answer = await reader.readexactly(int(fields["content-length"]))
    return int(lines[0].split()[1]), answer, fields.get("connection") != "close"
