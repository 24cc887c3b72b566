"""Big blocks of memory, and how the C library looks after them.

glibc serves blocks of up to 32 MiB from its heap once one of them was freed, and there a hole is
too small for the next aligned block of the same size (up to version 2.37). A step on 8,191 tokens
of SmolLM2-135M, whose states are 18 MiB each, peaked at 1,036 MiB that way and at about 800 MiB
without.
"""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3
BIG = 2**24  # bytes: more than any activation of the usual 1,000 tokens, which stay in the heap


def return_big_blocks(size: int = BIG) -> bool:
    """Let blocks of `size` bytes and more go back to the system when they are freed.

    For the rest of the process. False where the C library cannot (it is not glibc).
    """
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(M_MMAP_THRESHOLD, size))
    except (AttributeError, OSError, TypeError):  # no such function; Windows has no CDLL(None)
        return False
