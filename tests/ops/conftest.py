"""What the op tests share: backends, inputs, and the one rule and table of tolerances."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch

from sarm import ops
from sarm.ops import cuda

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulator"))

import emulator_build

# error(ours) <= 2 x error(PyTorch in the same dtype) + FLOOR x scale, where errors are against
# fp64. The floor is about one rounding of the result, because PyTorch may be exact by luck; where a
# sum may cancel, `terms` (the sum of its terms' absolute values) is the scale that is rounded.
FLOOR = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}

BACKENDS = ("reference", "cpu", "triton", "cuda")


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The CUDA kernels compiled for the CPU (tests/cuda_emulator), once a session."""
    if (reason := emulator_build.missing()) is not None:
        pytest.skip(reason)
    return emulator_build.library(tmp_path_factory.mktemp("cuda_emulator"))


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on one backend, chosen by name: it fails rather than falls back."""
    with contextlib.ExitStack() as stack:
        if request.param == "cuda":
            stack.enter_context(cuda.emulated(request.getfixturevalue("emulator")))
        reason = ops.dispatch.BACKENDS[request.param].unavailable()
        if reason is not None:
            pytest.skip(f"backend {request.param}: {reason}")
        stack.enter_context(ops.use_backend(request.param))
        yield request.param


@pytest.fixture(autouse=True)
def _seed_and_no_override(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.delenv("SARM_BACKEND", raising=False)


@pytest.fixture
def check_error():
    def check(ours, torchs, exact, terms=None):
        assert ours.shape == exact.shape
        if exact.numel() == 0:
            return
        scale = (exact.abs() if terms is None else terms).max().item()
        error = (ours.double() - exact).abs().max().item()
        allowed = 2 * (torchs.double() - exact).abs().max().item() + FLOOR[ours.dtype] * scale
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, scale {scale:.3g}"

    return check


@pytest.fixture
def latents():
    """(vals, idx) of N tokens with k distinct latents each."""

    def make(n, k, n_latents, dtype=torch.float32):
        vals = torch.randn(n, k, dtype=dtype)
        idx = torch.rand(n, n_latents).argsort(dim=1)[:, :k].contiguous()
        return vals, idx

    return make
