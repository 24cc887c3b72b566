"""The server process: socket, signals, and an end that answers everything it accepted."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from sarm.errors import InputError

try:
    import uvicorn
except ImportError as error:
    raise InputError(f"sarm serve needs pip install 'sarm[serve]' ({error})") from error

BACKLOG = 2048


class Served(Protocol):
    """What is run here: an ASGI application, and what is told of it at its end."""

    app: Any
    name: str
    timeout_s: float
    on_failure: Callable[[], None]
    failure: Exception | None
    accepted: int
    answered: int


def listen(host: str, port: int) -> socket.socket:
    """A bound TCP socket, or an InputError; port 0 takes a free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # accepted sockets inherit it. asyncio sets it only where a socket names its protocol, which
        # this one does not; without it a body waits 40 ms for the delayed ACK of its header
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}:{port} ({error})") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_from(name: str | None) -> str | None:
    """The bearer token in the environment variable `name`."""
    if name is None:
        return None
    token = os.environ.get(name, "").strip()
    if not token:
        raise InputError(f"--token-env: the environment variable {name} is not set")
    return token


class Server(uvicorn.Server):
    """Stops on SIGTERM and SIGINT: no new connections, every accepted request is answered."""

    def __init__(self, service: Served) -> None:
        config = uvicorn.Config(
            service.app,
            log_level="warning",
            access_log=False,
            lifespan="on",
            backlog=BACKLOG,
            # requests end by themselves at their deadline; this is for clients that never read
            timeout_graceful_shutdown=int(service.timeout_s) + 5,
        )
        super().__init__(config)
        service.on_failure = self.stop

    def stop(self) -> None:
        """Begin the end, from any thread."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, but bytes that have arrived are read first: they may be requests."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(0.05)
        await super().shutdown(sockets)


def serve(service: Served, sock: socket.socket, announce: Callable[[str], None]) -> None:
    """Run until a signal; raises what made loading fail."""
    server = Server(service)
    with _stopped_by_signals(server):
        host, port = sock.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        announce(f"serving {service.name} on http://{host}:{port}")
        server.run(sockets=[sock])
    if service.failure is not None:
        raise service.failure
    announce(f"stopped: {service.answered} of {service.accepted} requests answered")


@contextlib.contextmanager
def _stopped_by_signals(server: Server) -> Iterator[None]:
    """Handlers for the time before uvicorn's own are in place, and after.

    When it has stopped, uvicorn raises the signal once more; by default that would end the process
    with exit code 143 (Kubernetes and systemd call it a failure).
    """
    main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGTERM, signal.SIGINT) if main else ()
    before = [signal.signal(s, lambda *_: server.stop()) for s in signals]
    try:
        yield
    finally:
        for s, handler in zip(signals, before, strict=True):
            signal.signal(s, handler)
