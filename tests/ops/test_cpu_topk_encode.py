"""The C++ topk_encode: screening by tiles is exact, and a row's bits do not depend on its batch."""

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sarm.ops import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="sarm._C is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (dtype, run bf16 GEMMs in bf16): the second is what a CPU with bf16 instructions does, and it is
# as right, only slow, on one without.
GEMMS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True),
         (torch.float16, False)]  # fmt: skip
DIRECT = 8  # rows up to which no GEMM runs


def encode(x, w_enc, b_enc, k, native_bf16=False):
    return torch.ops.sarm_cpu.topk_encode(x, w_enc, b_enc, k, native_bf16)


def problem(n, d, n_latents, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw).to(dtype)
    w_enc = (torch.randn(n_latents, d, generator=draw) / max(d, 1) ** 0.5).to(dtype)
    return x, w_enc, torch.randn(n_latents, generator=draw) / 10


def row_by_row(x, w_enc, b_enc, k):
    """The direct path, which has no tiles, bounds by screening or margins."""
    parts = [encode(row[None], w_enc, b_enc, k) for row in x]
    return torch.cat([vals for vals, _ in parts]), torch.cat([idx for _, idx in parts])


def same(a, b):
    return torch.equal(a[1], b[1]) and torch.equal(a[0].nan_to_num(7e9), b[0].nan_to_num(7e9))


@pytest.mark.parametrize(("dtype", "native"), GEMMS)
@pytest.mark.parametrize(
    ("n", "d", "n_latents", "k"),
    [(40, 65, 700, 9), (9, 576, 5000, 64), (300, 48, 3000, 200), (33, 16, 1500, 1500),
     (1200, 24, 1100, 5), (20, 1, 300, 3), (64, 130, 2049, 1)],
)  # fmt: skip
def test_screening_has_the_bits_of_exact_products(n, d, n_latents, k, dtype, native):
    x, w_enc, b_enc = problem(n, d, n_latents, dtype)
    assert same(encode(x, w_enc, b_enc, k, native), row_by_row(x, w_enc, b_enc, k))


@pytest.mark.parametrize(("dtype", "native"), GEMMS)
def test_the_exact_products_are_right(dtype, native):
    x, w_enc, b_enc = problem(50, 200, 3000, dtype)
    vals, idx = encode(x, w_enc, b_enc, 30, native)
    exact = x.double() @ w_enc.double().t() + b_enc.double()
    assert (vals - exact.gather(1, idx)).abs().max() < 2e-6
    assert (vals - exact.topk(30).values).abs().max() < 2e-6


@pytest.mark.parametrize(("dtype", "native"), GEMMS)
def test_a_row_is_the_same_in_every_batch(dtype, native):
    x, w_enc, b_enc = problem(700, 64, 2500, dtype)
    whole = encode(x, w_enc, b_enc, 20, native)
    for start, stop in [(0, 1), (3, 8), (5, 40), (100, 360), (0, 699)]:
        part = encode(x[start:stop], w_enc, b_enc, 20, native)
        assert same(part, [t[start:stop] for t in whole])
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    assert same(encode(x[order], w_enc, b_enc, 20, native), [t[order] for t in whole])


def test_threads_do_not_change_a_bit():
    x, w_enc, b_enc = problem(600, 64, 5000, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results += [encode(x[:n], w_enc, b_enc, 20) for n in (5, 40, 600)]
    finally:
        torch.set_num_threads(threads)
    for i, result in enumerate(results[3:]):
        assert same(result, results[i % 3])


def near_ties(x, w, b):
    """Sixty latents above all others that differ by less than the roundings of their sums.

    Terms of 1000 cancel. What is added while one of them is in the sum is rounded to 6e-5, what
    comes before or after is not, and a GEMM takes the terms in another order than the exact dot.
    """
    b.fill_(-1e4)
    b[100:160] = 0
    x[:, 0], x[:, 17], x[:, 5], x[:, 20] = 1000, -1000, 1, 1
    w[100:160] = w[100]
    w[100:160, 0] = w[100:160, 17] = 1
    w[100:160:2, 5] += torch.arange(0, 60, 2) * 1e-5
    w[101:160:2, 20] += torch.arange(1, 60, 2) * 1e-5


HARD = {
    "zero rows": lambda x, w, b: x.zero_(),
    "one zero row": lambda x, w, b: x[3].zero_(),
    "no bias, zero rows": lambda x, w, b: (x.zero_(), b.zero_()),
    "equal latents": lambda x, w, b: (w.copy_(w[:1].expand_as(w)), b.zero_()),
    "latents in pairs": lambda x, w, b: (w[1::2].copy_(w[::2]), b.zero_()),
    "NaN in a row": lambda x, w, b: x[2, 5].fill_(float("nan")),
    "inf in a row": lambda x, w, b: x[2, 5].fill_(float("inf")),
    "NaN in a latent": lambda x, w, b: w[77, 3].fill_(float("nan")),
    "inf in a latent": lambda x, w, b: w[77, 3].fill_(float("-inf")),
    "NaN bias": lambda x, w, b: b[5].fill_(float("nan")),
    "-inf biases": lambda x, w, b: b[::2].fill_(float("-inf")),
    "few latents alive": lambda x, w, b: b[4:].fill_(float("-inf")),
    "+inf bias": lambda x, w, b: b[99].fill_(float("inf")),
    "huge row": lambda x, w, b: x[1].mul_(2e4),
    "ascending": lambda x, w, b: b.copy_(torch.arange(len(b)) * 10.0),
    "descending": lambda x, w, b: b.copy_(torch.arange(len(b)) * -10.0),
    "one long latent": lambda x, w, b: w[500].mul_(3e3),
    "large biases": lambda x, w, b: b.add_(1e6),
    "near ties": near_ties,
}


@pytest.mark.parametrize(("dtype", "native"), GEMMS)
@pytest.mark.parametrize("name", HARD)
def test_rows_that_screening_alone_cannot_decide(name, dtype, native):
    x, w_enc, b_enc = problem(24, 32, 1200, dtype)
    HARD[name](x, w_enc, b_enc)
    assert same(encode(x, w_enc, b_enc, 16, native), row_by_row(x, w_enc, b_enc, 16))


@pytest.mark.parametrize("scale", [1e-30, 1e18, 1e19, 3e19])
def test_products_near_the_ends_of_fp32(scale):
    x, w_enc, b_enc = problem(20, 32, 700, torch.float32)
    b_enc.zero_()
    args = x * scale, w_enc * scale, b_enc, 9
    assert same(encode(*args), row_by_row(*args))


@given(
    n=st.integers(DIRECT + 1, 60),
    n_latents=st.integers(1, 2100),
    d=st.integers(0, 130),
    k=st.integers(1, 2100),
    gemm=st.sampled_from(GEMMS),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
def test_any_shape(n, n_latents, d, k, gemm, seed):
    k = min(k, n_latents)
    x, w_enc, b_enc = problem(n, d, n_latents, gemm[0], seed)
    assert same(encode(x, w_enc, b_enc, k, gemm[1]), row_by_row(x, w_enc, b_enc, k))


def test_every_fp16_number_is_widened_exactly():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    w_enc = every[:, None].contiguous()
    one = torch.ones(1, 1, dtype=torch.float16)
    vals, idx = encode(one, w_enc, torch.zeros(len(every)), len(every))
    expected = every.float()[idx[0]]
    assert torch.equal(vals[0].nan_to_num(7e9), expected.nan_to_num(7e9))
    # and in lanes of sixteen: row i holds number i at one place
    wide = torch.zeros(64, 64, dtype=torch.float16)
    some = every[torch.arange(64) * 1023]
    wide[torch.arange(64), torch.arange(64)] = some
    vals, idx = encode(torch.ones(1, 64, dtype=torch.float16), wide, torch.zeros(64), 64)
    assert torch.equal(vals[0].nan_to_num(7e9), some.float()[idx[0]].nan_to_num(7e9))


PEAK = """
import re, torch
from sarm import ops

def status(name):
    text = open("/proc/self/status").read()
    return int(re.search(name + r":\\s+(\\d+) kB", text).group(1)) * 1024

for n, d, n_latents, k in [(6000, 64, 4096, 64), (200, 2048, 8192, 192), (3000, 8, 512, 512)]:
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(n, d).to(dtype), torch.randn(n_latents, d).to(dtype)
        b = torch.zeros(n_latents)
        ops.topk_encode(x[:64], w, b, k)  # what libraries allocate once
        open("/proc/self/clear_refs", "w").write("5")
        before = status("VmRSS")
        out = ops.topk_encode(x, w, b, k)
        print(status("VmHWM") - before - sum(t.nbytes for t in out))
        del out
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_extra_memory_is_bounded_at_any_n():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    extra = [int(line) for line in done.stdout.split()]
    assert len(extra) == 6
    assert max(extra) > 2**20  # else nothing was measured
    assert max(extra) < 64 * 2**20
