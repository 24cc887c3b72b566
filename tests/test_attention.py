"""Packed attention against its definition in fp64, and the bits of a query in any packing."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sarm import attention as module
from sarm.attention import Spans, attention, by_run, joined
from sarm.ops import cpu

needs_kernel = pytest.mark.skipif(cpu.unavailable() is not None, reason="sarm._C is not built")

# A prompt of 70 tokens, two branches, one of them continued, and a lone row: (rows, path).
RUNS = [(0, 70, ()), (70, 90, (0,)), (160, 3, (0,)), (163, 40, (0, 1)), (203, 5, ())]
TOTAL = 208


def spans_of_tree():
    runs = []
    for first, count, path in RUNS:
        past = [RUNS[i][:2] for i in path]
        runs.append((first, count, sum(n for _, n in past), [*past, (first, count)]))
    return Spans.of(runs)


def exact(q, k, v, spans, scale, window=None, softcap=None):
    """Softmax written out, one query and head at a time, in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for first, count, position, begin, many in spans.queries.tolist():
        ranges = spans.ranges[begin : begin + many].tolist()
        rows = torch.cat([torch.arange(r, r + n) for r, n in ranges])
        for t in range(count):
            own = rows[: position + t + 1][-(window or TOTAL) :]
            for h in range(q.shape[1]):
                scores = k[own, h // group] @ q[first + t, h] * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                out[first + t, h] = scores.softmax(0) @ v[own, h // group]
    return out


@pytest.mark.parametrize("window", [None, 1, 8, 70])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("heads", "groups", "width"), [(6, 2, 16), (7, 1, 20), (2, 2, 72)])
def test_values(heads, groups, width, window, softcap):
    q, k, v = (torch.randn(TOTAL, n, width) * 2 for n in (heads, groups, groups))
    spans, options = spans_of_tree(), {"scale": 0.3, "window": window, "softcap": softcap}
    wanted = exact(q, k, v, spans, **options)
    torch.testing.assert_close(
        by_run(q.double(), k.double(), v.double(), spans, **options), wanted, rtol=1e-9, atol=1e-9
    )
    # fp32's floor: a chain of 72 products that the portable build does not fuse, scores up to 50
    for dtype, floor in ((torch.float32, 1e-5), (torch.bfloat16, 1e-3)):
        narrow = [t.to(dtype) for t in (q, k, v)]
        wanted = exact(*narrow, spans, **options)
        got, theirs = (f(*narrow, spans, **options) for f in (attention, by_run))
        assert got.dtype == dtype
        errors = [(found.double() - wanted).abs().max().item() for found in (got, theirs)]
        assert errors[0] <= 2 * errors[1] + floor


@needs_kernel
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_bits_do_not_depend_on_the_packing(data):
    """One sequence, cut anywhere into pieces that lie anywhere, among other rows."""
    length = data.draw(st.integers(1, 300))
    window = data.draw(st.sampled_from([None, 1, 40, 64, 100]))
    softcap = data.draw(st.sampled_from([None, 4.0]))
    cuts = data.draw(st.sets(st.integers(1, length), max_size=5).map(sorted))
    gaps = data.draw(st.lists(st.integers(0, 9), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    torch.manual_seed(length)
    q, k, v = (torch.randn(length, n, 24) for n in (6, 2, 2))
    options = {"scale": 0.7, "window": window, "softcap": softcap}
    alone = attention(q, k, v, Spans.of([(0, length, 0, [(0, length)])]), **options)
    runs, ranges, row = [], [], 0
    places = torch.empty(length, dtype=torch.long)
    for start, end, gap in zip([0, *cuts], [*cuts, length], gaps, strict=True):
        if gap:
            runs.append((row, gap, 0, [(row, gap)]))
            row += gap
        if end > start:
            ranges.append((row, end - start))
            runs.append((row, end - start, start, list(ranges)))
            places[start:end] = torch.arange(row, row + end - start)
            row += end - start
    packed = [torch.randn(row, *t.shape[1:]) for t in (q, k, v)]
    for whole, own in zip(packed, (q, k, v), strict=True):
        whole[places] = own
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            got = attention(*packed, Spans.of(runs), **options)
            assert torch.equal(got[places], alone)
    finally:
        torch.set_num_threads(threads)


@needs_kernel
@pytest.mark.parametrize("window", [None, 1, 8, 70])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("heads", "groups", "width"), [(6, 2, 16), (7, 1, 20), (2, 2, 72)])
def test_gradients(heads, groups, width, window, softcap):
    """The kernel's against autograd's of the definition in fp64; no bit depends on the threads."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(TOTAL, n, width) for n in (heads, groups, groups, heads)]
    *inputs, d_out = (torch.randn(shape, generator=draw) for shape in shapes)
    spans, options = spans_of_tree(), {"scale": 0.3, "window": window, "softcap": softcap}

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves, spans, **options), leaves, d_out.to(dtype))

    found = gradients(attention, torch.float32)
    for got, theirs, wanted in zip(
        found,
        gradients(by_run, torch.float32),
        gradients(by_run, torch.float64),
        strict=True,
    ):
        size = wanted.abs().max()
        assert (got - wanted).abs().max() <= 2 * (theirs - wanted).abs().max() + 1e-6 * size
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for one, two in zip(found, gradients(attention, torch.float32), strict=True):
            assert torch.equal(one, two)
    finally:
        torch.set_num_threads(threads)


@needs_kernel
def test_large_and_infinite_scores():
    q, k, v = torch.randn(9, 1, 16) * 1e3, torch.randn(9, 1, 16) * 1e3, torch.randn(9, 1, 16)
    spans = Spans.of([(0, 9, 0, [(0, 9)])])
    wanted = exact(q, k, v, spans, 1.0)
    torch.testing.assert_close(attention(q, k, v, spans, scale=1.0).double(), wanted)
    k[4] = torch.nan
    got = attention(q, k, v, spans, scale=1.0)
    assert got[:4].isfinite().all()
    assert got[4:].isnan().all()


def test_single_queries_at_the_end():
    q, k, v = torch.randn(3, 4, 16), torch.randn(TOTAL, 2, 16), torch.randn(TOTAL, 2, 16)
    ends = [(0, 1, 69, [(0, 70)]), (1, 1, 159, [(0, 160)]), (2, 1, 4, [(203, 5)])]
    spans = Spans.of(ends)
    wanted = exact(q, k, v, spans, 0.25)
    for found in (attention, by_run):
        got = found(q, k, v, spans, scale=0.25)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_touching_ranges_are_joined():
    assert joined(joined(joined([], 3, 2), 5, 3), 0, 2) == [(3, 5), (0, 2)]
    spans = Spans.of([(0, 2, 5, [(3, 5), (0, 2)]), (2, 1, 4, [(3, 5)])])
    assert spans.ranges.tolist() == [[3, 5], [0, 2], [3, 5]]
    assert spans.queries.tolist() == [[0, 2, 5, 0, 2], [2, 1, 4, 2, 1]]


def test_flash_attn_gets_the_same_problem(monkeypatch):
    """A stand-in with flash_attn's documented meaning of its arguments."""

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap):
        assert causal
        assert softcap == 0.0
        out = torch.empty_like(q)
        assert (cu_q.diff().max(), cu_k.diff().max()) == (max_q, max_k)
        for (a, b), (c, d) in zip(
            cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True
        ):
            i = torch.arange(d - c - (b - a), d - c)[:, None]  # lower right
            j = torch.arange(d - c)
            mask = j <= i
            if window_size[0] >= 0:
                mask &= j >= i - window_size[0]
            out[a:b] = torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d])),
                attn_mask=mask,
                scale=softmax_scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
        return out

    monkeypatch.setattr(module, "_flash_attn", lambda: varlen)
    q, k, v = (torch.randn(TOTAL, n, 16) for n in (4, 2, 2))
    order = torch.randperm(len(RUNS)).tolist()
    spans = spans_of_tree()
    spans = replace(spans, queries=spans.queries[order])
    for window in (None, 20):
        got = module._flash(q, k, v, spans, 0.3, window, None)
        torch.testing.assert_close(got, by_run(q, k, v, spans, scale=0.3, window=window))


def test_no_queries():
    q, k = torch.empty(0, 4, 8), torch.randn(3, 2, 8)
    assert attention(q, k, k, Spans.of([]), scale=1.0).shape == (0, 4, 8)


@needs_kernel
@pytest.mark.parametrize(
    ("runs", "text"),
    [([(0, 4, 0, [(0, 5)])], r"range 0 is not in \[0, 4\)"),
     ([(1, 4, 0, [(0, 4)])], r"run 0 is not in \[0, 4\)"),
     ([(0, 4, 1, [(0, 4)])], "run 0 ends at position 5 of 4 keys"),
     ([(0, 3, 0, [(0, 4)])], "the runs have 3 queries, q has 4")],
)  # fmt: skip
def test_spans_outside_the_tensors_are_refused(runs, text):
    q, k = torch.randn(4, 4, 8), torch.randn(4, 2, 8)
    with pytest.raises(RuntimeError, match=text):
        attention(q, k, k, Spans.of(runs), scale=1.0)


@needs_kernel
def test_arguments_of_the_kernel():
    q, k = torch.randn(4, 3, 8), torch.randn(4, 2, 8)
    spans = Spans.of([(0, 4, 0, [(0, 4)])])
    with pytest.raises(RuntimeError, match="multiple of the key heads, got 3 and 2"):
        attention(q, k, k, spans, scale=1.0)
    with pytest.raises(RuntimeError, match="one dtype and one head width"):
        attention(q[:, :2], k.bfloat16(), k, spans, scale=1.0)
