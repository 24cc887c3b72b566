"""Latents spread over processes: the merge is the op's own order, and gradients are whole."""

import distributed_jobs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sarm import ops
from sarm.training.distributed import merged_places


def merged(x, w_enc, b_enc, k, shards):
    """topk_encode by the merge, without processes."""
    n_local = len(w_enc) // shards
    width = min(k, n_local)
    parts = [
        ops.topk_encode(x, w, b, width)
        for w, b in zip(w_enc.split(n_local), b_enc.split(n_local), strict=True)
    ]
    vals = torch.stack([p.vals for p in parts])
    idx = torch.stack([p.idx + s * n_local for s, p in enumerate(parts)])
    places = merged_places(vals)
    found = vals.new_empty(len(x), k), idx.new_empty(len(x), k)
    for s, n, j in (places < k).nonzero().tolist():
        found[0][n, places[s, n, j]] = vals[s, n, j]
        found[1][n, places[s, n, j]] = idx[s, n, j]
    return found


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_merge_is_the_op_ties_included(data):
    shards = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    n_local, d = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    n_latents = shards * n_local
    k = data.draw(st.integers(1, n_latents))
    # products of small integers are exact, and most of them are tied; zeros of both signs too
    number = st.sampled_from([-1.0, -0.0, 0.0, 1.0])

    def matrix(rows, columns):
        flat = data.draw(st.lists(number, min_size=rows * columns, max_size=rows * columns))
        return torch.tensor(flat).view(rows, columns)

    x, w_enc = matrix(data.draw(st.integers(0, 3)), d), matrix(n_latents, d)
    bias = matrix(1, n_latents)[0]
    bias[data.draw(st.integers(0, n_latents - 1))] = data.draw(
        st.sampled_from([0.0, -torch.inf, torch.inf, torch.nan])
    )
    expected = ops.topk_encode(x, w_enc, bias, k)
    vals, idx = merged(x, w_enc, bias, k, shards)
    assert torch.equal(idx, expected.idx)
    torch.testing.assert_close(vals, expected.vals, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("size", "n_latents", "k"), [(2, 48, 7), (4, 48, 20)], ids=["2", "4, k > n_latents / 4"]
)
def test_sharded_over_processes_is_the_sae(launch, size, n_latents, k):
    found = launch(distributed_jobs.encode_and_differentiate, size, size, n_latents, k)
    sae = distributed_jobs.small_sae(n_latents, k)
    torch.manual_seed(1)
    x = torch.randn(33, sae.d_model)
    latents = sae.encode_normalized(x)
    decoded = sae.decode(latents)
    (decoded - x).square().sum().backward()
    for (vals, idx), again, _ in found:
        assert torch.equal(idx, latents.idx)
        assert torch.equal(vals, latents.vals)
        torch.testing.assert_close(again, decoded)
    gradients = found[0][2]
    for name, parameter in sae.named_parameters():
        scale = float(parameter.grad.abs().max())  # sums of 33 rows, in another order
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=0, atol=1e-6 * scale, msg=name
        )
