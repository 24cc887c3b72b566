"""In 8 bits a score has the same bits alone, in any batch, order, packing and number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sarm import SarmForSequenceClassification, SARMScorer, TopKSAE
from sarm.quantization import quantize_backbone

VOCAB = 300
row = st.lists(st.integers(0, 3), min_size=1, max_size=40)  # few ids: prefixes are shared


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3"])
def scorer(request, causal_lm, tmp_path_factory):
    import sarm

    folder = tmp_path_factory.mktemp(request.param)
    causal_lm(request.param).save_pretrained(folder)
    backbone = sarm.load_backbone(folder, device="cpu", dtype=torch.float32, quantization="int8")
    torch.manual_seed(5)
    backbone.set_scored([2, 7], torch.randn(2, 32))  # some rows get 16 bits and an offset
    sae = TopKSAE(32, 96, 5)
    model = SarmForSequenceClassification.from_parts(backbone, sae, torch.randn(1, 96))
    return SARMScorer(model)


def alone(scorer, rows):
    return torch.cat([scorer.score_token_ids([row]) for row in rows])


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(row, min_size=1, max_size=9),
    shared=row,
    order=st.randoms(use_true_random=False),
    budget=st.sampled_from([1, 3, 16, 64, 4096]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_any_batch(scorer, rows, shared, order, budget, threads):
    rows = rows + [shared + row for row in rows]
    expected = alone(scorer, rows)
    places = list(range(len(rows)))
    order.shuffle(places)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    batched = SARMScorer(scorer.model, max_batch_tokens=budget)
    try:
        ours = batched.score_token_ids([rows[i] for i in places])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ours, expected[places])


def test_wide_batches(scorer):
    """Enough tokens for several chunks and threads; sequences longer than a pass."""
    torch.manual_seed(1)
    rows = [torch.randint(VOCAB, (n,)).tolist() for n in (3000, 1, 700, 1100)]
    rows += [rows[0][:1500] + row[:200] for row in rows]
    expected = alone(scorer, rows)
    before = torch.get_num_threads()
    try:
        for threads, budget in ((2, 4096), (3, 1000), (1, 8192)):
            torch.set_num_threads(threads)
            batched = SARMScorer(scorer.model, max_batch_tokens=budget, max_length=10_000)
            assert torch.equal(batched.score_token_ids(rows), expected)
    finally:
        torch.set_num_threads(before)


def test_bf16_attention(scorer):
    backbone = scorer.model.model
    narrow = SarmForSequenceClassification.from_parts(
        quantized_like(backbone, torch.bfloat16), scorer.model.sae, scorer.model.score.weight
    )
    ours = SARMScorer(narrow)
    rows = [[1, 2, 3], [1, 2, 3, 4, 5], [7] * 30, [1, 2, 9]]
    assert torch.equal(ours.score_token_ids(rows), alone(ours, rows))
    assert not torch.equal(ours.score_token_ids(rows), scorer.score_token_ids(rows))


def quantized_like(decoder, dtype):
    """The same 8-bit layers, attention in another dtype."""
    import copy

    twin = copy.deepcopy(decoder)
    twin.attention_dtype = dtype
    for layer in twin.layers:
        layer.dtype = dtype
    return twin


@pytest.mark.slow
def test_smollm2(smollm2_backbone):
    """Real widths: 576, 9 heads, 1,536; rows of hundreds of tokens, two threads."""
    decoder = quantize_backbone(smollm2_backbone)
    torch.manual_seed(0)
    decoder.set_scored([2, 17], torch.randn(2, 576))
    model = SarmForSequenceClassification.from_parts(
        decoder, TopKSAE(576, 2304, 27), torch.randn(1, 2304)
    )
    prompt = torch.randint(49152, (333,)).tolist()
    rows = [prompt + torch.randint(49152, (n,)).tolist() for n in (5, 80, 81, 300, 1)]
    rows += [torch.randint(49152, (n,)).tolist() for n in (1, 17, 512, 1029)]
    rows += [[2], [*rows[0][:50], 2, 9, 17], [*rows[0], 2], [2] * 40]
    expected = alone(SARMScorer(model), rows)
    before = torch.get_num_threads()
    try:
        for threads, budget in ((2, 4096), (1, 700)):
            torch.set_num_threads(threads)
            scorer = SARMScorer(model, max_batch_tokens=budget)
            assert torch.equal(scorer.score_token_ids(rows[::-1]), expected.flip(0))
    finally:
        torch.set_num_threads(before)
