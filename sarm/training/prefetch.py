"""The next item of an iterator is computed while the caller works on the last one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Stopped(Exception):
    """Nobody wants the item any more."""


def prefetch(
    make: Callable[[Callable[[], None]], Iterator[T]], device: torch.device | str = "cpu"
) -> Generator[T]:
    """The items of `make(check)`, in their order, one ahead, computed in a thread.

    At most two exist: the one yielded last and the next. What the iterator raises is raised here,
    where its item would have been yielded. On a GPU the thread has a stream of its own, so its
    kernels run beside the caller's; items must not depend on that stream any more when they are
    yielded (those of `StateStream` lie on the CPU).

    Args:
        make: its iterator calls `check()` now and then, which raises `Stopped` in the thread once
            this generator is closed. Closing waits for that.
    """
    stop, threads = threading.Event(), torch.get_num_threads()
    on_gpu = torch.device(device).type == "cuda"
    stream = torch.cuda.Stream(device) if on_gpu else None
    if stream is not None:  # what the caller has queued so far, the weights' copy above all
        stream.wait_stream(torch.cuda.current_stream(device))

    def check() -> None:
        if stop.is_set():
            raise Stopped

    def start() -> None:  # the number of threads decides how sums are split, so their last bits
        torch.set_num_threads(threads)

    items = make(check)
    done = object()

    def step() -> T | object:
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            return next(items, done)

    with ThreadPoolExecutor(1, "prefetch", start) as worker:
        ahead = worker.submit(step)
        try:
            while (item := ahead.result()) is not done:
                ahead = worker.submit(step)
                yield item  # type: ignore[misc]
                del item
        finally:
            stop.set()
