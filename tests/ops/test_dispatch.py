"""Backend choice: auto, by name, by environment; a named backend never falls back."""

import re

import pytest
import torch

from sarm import ops
from sarm.ops import cpu, dispatch, reference

X32 = torch.zeros(2, 3)


def test_auto_takes_cpp_where_it_can_and_the_reference_elsewhere(monkeypatch):
    if cpu.unavailable() is None:
        assert dispatch.select("gather_sum", X32) is cpu.gather_sum
        assert dispatch.select("gather_sum", X32.bfloat16()) is cpu.gather_sum
    assert dispatch.select("gather_sum", X32.double()) is reference.gather_sum
    assert dispatch.select("gather_sum", X32.half()) is reference.gather_sum
    assert dispatch.select("gather_sum", X32.to("meta")) is reference.gather_sum


def test_use_backend_nests_and_ends():
    with ops.use_backend("reference"):
        assert dispatch.select("gather_dot", X32) is reference.gather_dot
        with ops.use_backend(gather_dot="auto"):
            assert dispatch.select("gather_dot", X32) is not None
            assert dispatch.select("gather_sum", X32) is reference.gather_sum
        assert dispatch.select("gather_dot", X32) is reference.gather_dot
    assert dispatch._override == {}


def test_use_backend_ends_after_an_exception():
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    assert dispatch._override == {}


def test_environment(monkeypatch):
    monkeypatch.setenv("SARM_BACKEND", "reference")
    assert dispatch.select("gather_sum", X32) is reference.gather_sum
    monkeypatch.setenv("SARM_BACKEND", "gather_sum=reference, sparse_value=cuda")
    assert dispatch.select("gather_sum", X32) is reference.gather_sum
    with pytest.raises(ops.BackendUnavailableError):
        dispatch.select("sparse_value", X32)
    with ops.use_backend("reference"):  # code wins over the environment
        assert dispatch.select("sparse_value", X32) is reference.sparse_value


def test_unknown_names(monkeypatch):
    expected = re.escape(
        "unknown backend 'gpu', expected one of auto, reference, cpu, triton, cuda"
    )
    with pytest.raises(ValueError, match="use_backend: " + expected), ops.use_backend("gpu"):
        pass
    text = "use_backend: unknown op 'decode'"
    with pytest.raises(ValueError, match=text), ops.use_backend(decode="cpu"):
        pass
    monkeypatch.setenv("SARM_BACKEND", "gpu")
    with pytest.raises(ValueError, match="SARM_BACKEND: " + expected):
        dispatch.select("gather_sum", X32)


def run_gather_sum(dtype=torch.float32):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    idx = torch.zeros(1, 1, dtype=torch.int64)
    return ops.gather_sum(torch.zeros(1, 1, dtype=wide), idx, torch.zeros(2, 3, dtype=dtype))


def test_named_backend_that_cannot_run_is_an_error():
    with ops.use_backend("cuda"), pytest.raises(ops.BackendUnavailableError) as error:
        run_gather_sum()
    assert str(error.value).startswith("gather_sum: backend 'cuda' cannot run: not built")


@pytest.mark.skipif(cpu.unavailable() is not None, reason="sarm._C is not built")
def test_named_backend_rejects_dtypes():
    text = "gather_sum: backend 'cpu' cannot run: it takes float32, bfloat16, got float64"
    with ops.use_backend("cpu"), pytest.raises(ops.BackendUnavailableError, match=text):
        run_gather_sum(torch.float64)


def test_status_names_every_backend():
    status = ops.backend_status()
    assert tuple(status) == ("reference", "cpu", "triton", "cuda")
    assert status["reference"].available
    assert all(entry.reason for entry in status.values())
    assert not status["cuda"].available
    assert "csrc/cuda" in status["cuda"].reason
    assert ops.available_backends() == tuple(n for n, s in status.items() if s.available)
