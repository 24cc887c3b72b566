"""Which implementation of an op runs: `reference`, `cpu`, `triton` or `cuda`.

By default (`auto`) an op takes the first backend of its device's list that implements it, is
available and accepts the dtypes. A choice made by name is binding: if it cannot run, the call
raises `BackendUnavailableError` and says why, because a silent fallback would turn a benchmark
or a bug report into one of something else.

    SARM_BACKEND=reference python ...                   # every op
    SARM_BACKEND=sparse_value=triton,gather_sum=cpu     # some ops; the others stay `auto`
    with sarm.ops.use_backend("reference"): ...
    with sarm.ops.use_backend(topk_encode="reference"): ...
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from sarm.ops import cpu, cuda, reference, triton_backend

SPARSE_OPS = ("topk_encode", "sparse_value", "gather_sum", "gather_dot", "scatter_outer")
INT8_OPS = ("quantize_rows", "rmsnorm_quantize", "silu_mul_quantize", "int8_linear")
OPS = SPARSE_OPS + INT8_OPS
ENVIRONMENT_VARIABLE = "SARM_BACKEND"


class BackendUnavailableError(RuntimeError):
    """A backend was chosen by name and cannot run this call."""


class BackendStatus(NamedTuple):
    """What `sarm info` prints for one backend."""

    available: bool
    reason: str
    ops: tuple[str, ...]


class Backend(NamedTuple):
    """One family of implementations."""

    ops: Mapping[str, Callable[..., Any]]
    # Why it cannot run on this machine at all, or None.
    unavailable: Callable[[], str | None]
    # Why it cannot run this op on these tensors, or None.
    rejects: Callable[[str, tuple[Tensor, ...]], str | None]
    # What it is, for people.
    description: str


BACKENDS: dict[str, Backend] = {
    "reference": Backend(
        reference.OPS, lambda: None, lambda op, tensors: None, "PyTorch, every device and dtype"
    ),
    "cpu": Backend(cpu.OPS, cpu.unavailable, cpu.rejects, "C++ kernels of sarm._C"),
    "triton": Backend(
        triton_backend.OPS,
        triton_backend.unavailable,
        triton_backend.rejects,
        "Triton kernels of sarm.kernels",
    ),
    "cuda": Backend(cuda.OPS, cuda.unavailable, cuda.rejects, "CUDA C++ kernels of sarm._C"),
}

_AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

# Process-wide and not thread-local: autograd runs the backward of CUDA tensors in its own
# threads, where a choice made by the caller's thread would be invisible.
_override: dict[str, str] = {}


def available_backends() -> tuple[str, ...]:
    """The names of the backends that can run on this machine."""
    return tuple(name for name, status in backend_status().items() if status.available)


def backend_status() -> dict[str, BackendStatus]:
    """For every backend: can it run here, why (not), and which ops it implements."""
    status = {}
    for name, backend in BACKENDS.items():
        why_not = backend.unavailable()
        status[name] = BackendStatus(
            why_not is None, why_not or backend.description, tuple(backend.ops)
        )
    return status


@contextmanager
def use_backend(name: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Run ops on a chosen backend inside a `with` block.

    Takes precedence over SARM_BACKEND. The choice is process-wide, and it is read when an op
    runs: put the block around the call of a compiled function, not inside of it.

    Args:
        name: backend of every op: auto | reference | cpu | triton | cuda.
        by_op: backend of single ops, e.g. `topk_encode="reference"`.

    Raises:
        ValueError: unknown backend or op. Whether the backend can run shows at the first call.
    """
    global _override
    choice = dict.fromkeys(OPS, name) if name is not None else {}
    choice.update(by_op)
    _validate("use_backend", choice)
    outer = _override
    _override = {**outer, **{op: backend for op, backend in choice.items() if backend}}
    try:
        yield
    finally:
        _override = outer


def select(op: str, *tensors: Tensor) -> Callable[..., Any]:
    """The implementation of `op` for these tensors (the first one's device decides)."""
    name = _override.get(op) or _from_environment(op)
    if name != "auto":
        why_not = _why_not(name, op, tensors)
        if why_not is not None:
            raise BackendUnavailableError(f"{op}: backend {name!r} cannot run: {why_not}")
        return BACKENDS[name].ops[op]
    for name in _AUTO_ORDER.get(tensors[0].device.type, ()):
        if _why_not(name, op, tensors) is None:
            return BACKENDS[name].ops[op]
    return reference.OPS[op]


def _why_not(name: str, op: str, tensors: tuple[Tensor, ...]) -> str | None:
    backend = BACKENDS[name]
    if (reason := backend.unavailable()) is not None:
        return reason
    if op not in backend.ops:
        return f"it has no {op} in this version (only {', '.join(backend.ops)})"
    return backend.rejects(op, tensors)


def _from_environment(op: str) -> str:
    """SARM_BACKEND is read at every call (about 1 us), so that it can be set after the import."""
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not text:
        return "auto"
    if "=" not in text:
        choice = dict.fromkeys(OPS, text)
    else:
        choice = dict(part.strip().partition("=")[::2] for part in text.split(","))
    _validate(ENVIRONMENT_VARIABLE, choice)
    return choice.get(op, "auto")


def _validate(where: str, choice: Mapping[str, str | None]) -> None:
    for op, name in choice.items():
        if op not in OPS:
            raise ValueError(f"{where}: unknown op {op!r}, expected one of {', '.join(OPS)}")
        if name != "auto" and name not in BACKENDS:
            expected = ", ".join(["auto", *BACKENDS])
            raise ValueError(f"{where}: unknown backend {name!r}, expected one of {expected}")
