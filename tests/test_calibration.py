"""16-bit activations and an offset for the scored tokens of an 8-bit decoder."""

import pytest
import torch

from sarm import SARMScorer, load_backbone, load_tokenizer, ops
from sarm.calibration import CONVERSATIONS, ONE_PASS, calibrate, rows_for
from sarm.packing import last_states
from sarm.quantization import Int8DecoderLayer, quantize_backbone
from sarm.quantization.fine import fine_linear, silu_by_rows

INT8 = {"quantization": "int8", "device": "cpu", "dtype": torch.float32}


@pytest.fixture
def folder(backbone_dir, tokenizer):
    folder = backbone_dir()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(folder):
    return rows_for(folder, 300)


def error(ours, exact):
    return ((ours - exact).norm(dim=1) / exact.norm(dim=1)).mean().item()


def test_the_rows_are_short_conversations_that_end_with_one_token(folder, rows, tokenizer):
    assert len(rows) == CONVERSATIONS
    assert {row[-1] for row in rows} == {tokenizer.eos_token_id}
    assert rows_for(folder, vocab_size=5) == []  # a tokenizer of another model
    (folder / "chat_template.jinja").unlink()
    assert rows_for(folder, 300) == []
    (folder / "tokenizer.json").write_text("{")
    assert rows_for(folder, 300) == []


def test_layers_that_are_streamed_give_the_states_of_a_loaded_decoder(folder, rows):
    plain = load_backbone(folder, device="cpu", dtype=torch.float32)
    ours, expected = load_backbone(folder, **INT8), quantize_backbone(plain)
    calibrate(expected, rows, last_states(plain, rows, ONE_PASS))
    assert torch.equal(ours.scored_ids, expected.scored_ids)
    assert torch.equal(ours.offsets, expected.offsets)
    assert ours.offsets.abs().max() > 0


def test_the_offset_is_the_mean_difference_of_each_token(folder, rows):
    plain = load_backbone(folder, device="cpu", dtype=torch.float32)
    rows = [*rows, [5, 6, 7], [9, 7]]  # two ways to end
    exact, decoder = last_states(plain, rows), quantize_backbone(plain)
    calibrate(decoder, rows, exact)
    left = exact - last_states(decoder, rows)
    assert decoder.scored_ids.tolist() == [rows[0][-1], 7]
    for part in (left[:-2], left[-2:]):
        assert part.mean(0).abs().max() < 1e-5 * exact.abs().max()
    assert left.abs().max() > 1e-4 * exact.abs().max()  # not the states themselves


def test_held_out_states_are_nearer(folder, rows):
    plain = load_backbone(folder, device="cpu", dtype=torch.float32)
    end = rows[0][-1]
    torch.manual_seed(1)
    others = [[*torch.randint(3, 290, (n,)).tolist(), end] for n in range(5, 45)]
    exact = last_states(plain, others)
    plainly, fine = quantize_backbone(plain), quantize_backbone(plain)
    fine.set_scored([end])
    calibrated = quantize_backbone(plain)
    calibrate(calibrated, rows, last_states(plain, rows))
    errors = [error(last_states(d, others), exact) for d in (plainly, fine, calibrated)]
    assert errors[0] > 1.1 * errors[1]
    assert errors[1] > errors[2]  # by more where the states of a token are alike: real models


def test_only_scored_tokens_change(folder, rows):
    decoder = load_backbone(folder, **INT8)
    end = decoder.scored_ids.item()
    plain = load_backbone(folder, **INT8)
    plain.set_scored([])
    other = [[5, 9, 11], [4, 4]]
    assert torch.equal(last_states(decoder, other), last_states(plain, other))
    changed = [[5, 9, end], [4, end, 4]]  # the second one sees a token that changed
    differs = (last_states(decoder, changed) != last_states(plain, changed)).any(1)
    assert differs.tolist() == [True, True]


def test_a_padded_forward_does_the_same(folder):
    decoder = load_backbone(folder, **INT8)
    ids = [5, 9, 11, 30, decoder.scored_ids.item()]
    with torch.inference_mode():
        padded = decoder(torch.tensor([ids])).last_hidden_state[0, -1]
    packed = last_states(decoder, [ids])
    assert error(padded[None], packed) < 1e-4  # another order of sums in attention
    decoder.set_scored([])
    assert error(padded[None], last_states(decoder, [ids])) > 1e-3


def test_two_halves_make_16_bits():
    torch.manual_seed(0)
    weight, x = ops.quantize_rows(torch.randn(40, 64)), torch.randn(9, 64)
    exact = x.double() @ (weight.q.double() * weight.scale.double()[:, None]).T

    def linear(rows):
        return ops.int8_linear(*rows, *weight)

    ours = fine_linear(linear, x)
    assert error(linear(ops.quantize_rows(x)), exact) > 100 * error(ours, exact)
    alone = torch.cat([fine_linear(linear, row[None]) for row in x])
    assert torch.equal(ours, alone)


def test_silu_does_not_look_at_other_rows():
    torch.manual_seed(0)
    x = torch.randn(7, 37)
    together = silu_by_rows(x)
    assert all(torch.equal(silu_by_rows(x[i : i + 1])[0], together[i]) for i in range(7))
    torch.testing.assert_close(together, torch.nn.functional.silu(x))
    assert silu_by_rows(x[:0]).shape == (0, 37)


def test_without_a_template_nothing_is_calibrated(backbone_dir):
    decoder = load_backbone(backbone_dir(), **INT8)
    assert decoder.scored_ids.numel() == 0
    assert decoder.fine_rows(torch.tensor([1, 2])) is None


def test_it_is_saved(make_sarm, tokenizer, tmp_path, chat):
    SARMScorer(make_sarm(), tokenizer).save_pretrained(tmp_path / "float")
    scorer = SARMScorer.from_pretrained(tmp_path / "float", quantization="int8", device="cpu")
    assert scorer.model.model.scored_ids.tolist() == [tokenizer.eos_token_id]
    scorer.save_pretrained(tmp_path / "int8")
    again = SARMScorer.from_pretrained(tmp_path / "int8")
    assert torch.equal(again.model.model.offsets, scorer.model.model.offsets)
    assert again.model.model.fine_rows(torch.tensor([3, tokenizer.eos_token_id])).tolist() == [1]
    talks = [chat("hi", "hello"), chat("the quick", "brown fox")]
    assert torch.equal(again.score(talks), scorer.score(talks))


def test_biases_are_added_once(backbone_dir, tokenizer):
    """Qwen2's q, k and v have biases; a fine row's sum must not have them twice."""
    decoder = load_backbone(backbone_dir("qwen2"), **INT8)
    layer = decoder.layers[0]
    assert isinstance(layer, Int8DecoderLayer)
    layer.qkv.bias.fill_(10.0)
    x = torch.randn(3, 32)
    ours = layer.attention_inputs(x, fine=True)
    for a, b in zip(ours, layer.attention_inputs(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.1)


def test_the_tokenizer_of_a_folder_is_used(folder, rows):
    assert rows[0][-1] == load_tokenizer(folder).eos_token_id
