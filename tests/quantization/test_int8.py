"""The 8-bit decoder: close to fp32, batch-invariant around attention, refusals, memory."""

import copy
import re

import pytest
import torch
from transformers import AutoModel

from sarm import ops
from sarm.errors import InputError
from sarm.packing import PrefixCache, iter_last_states
from sarm.packing.blocks import unpackable
from sarm.quantization import Int8Decoder, quantize_backbone
from sarm.quantization.layer import LayerShape


def states(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).last_hidden_state


def dequantised(decoder, int8):
    """The fp32 decoder in int8's basis with int8's weights, activations in full precision."""
    model = copy.deepcopy(decoder)
    model.embed_tokens.weight.data = int8.embedding.float()
    for layer, packed in zip(model.layers, int8.layers, strict=True):
        s = packed.shape

        def rows(linear):
            return linear.weight.float() * linear.scale[:, None], linear.bias

        def put(linear, weight, bias):
            linear.weight.data = weight.contiguous()
            if bias is not None:
                linear.bias.data = bias.contiguous()

        weight, bias = rows(packed.qkv)
        sizes = [n * s.head_dim for n in (s.heads, s.kv_heads, s.kv_heads)]
        biases = bias.split(sizes) if bias is not None else (None,) * 3
        a = layer.self_attn
        for linear, w, b in zip(
            (a.q_proj, a.k_proj, a.v_proj), weight.split(sizes), biases, strict=True
        ):
            put(linear, w, b)
        put(a.o_proj, *rows(packed.o))
        weight, bias = rows(packed.gate_up)
        biases = bias.chunk(2) if bias is not None else (None, None)
        pair = (layer.mlp.gate_proj, layer.mlp.up_proj)
        for linear, w, b in zip(pair, weight.chunk(2), biases, strict=True):
            put(linear, w, b)
        put(layer.mlp.down_proj, *rows(packed.down))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data.fill_(1.0)
    return model


def relative_error(ours, exact):
    return ((ours - exact).norm(dim=-1) / exact.norm(dim=-1)).mean().item()


def test_layout(decoder):
    int8 = quantize_backbone(decoder)
    s, layer = int8.shape, int8.layers[0]
    d, f = decoder.config.hidden_size, decoder.config.intermediate_size
    assert layer.qkv.weight.shape == ((s.heads + 2 * s.kv_heads) * s.head_dim, d)
    assert layer.o.weight.shape == (d, s.heads * s.head_dim)
    assert layer.gate_up.weight.shape == (2 * f, d)
    assert layer.down.weight.shape == (d, f)
    linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
    assert all(linear.weight.dtype == torch.int8 for linear in linears)
    assert all(linear.scale.dtype == torch.float32 for linear in linears)
    assert layer.input_norm is None
    assert f % s.parts == 0
    assert s.parts in (8, 16)
    assert layer.parts == s.parts
    assert list(int8.parameters()) == []


def test_close_to_fp32_and_closer_to_its_own_weights(decoder):
    ids = torch.randint(0, decoder.config.vocab_size, (3, 20))
    int8 = quantize_backbone(decoder)
    exact, ours = states(decoder, ids), states(int8, ids)
    assert ours.dtype == torch.float32
    assert relative_error(ours, exact) < 0.05
    # With parts = 1 its weights can be put back into the fp32 decoder: only activations differ.
    plain = Int8Decoder(decoder.config, decoder.rotary_emb, decoder.embed_tokens.weight)
    plain.shape = LayerShape.of(decoder.config, parts=1)
    for layer in decoder.layers:
        plain.add_layer(layer.state_dict())
    same_weights = plain.restore(states(dequantised(decoder, plain), ids))
    assert relative_error(states(plain, ids), same_weights) < 0.04
    assert relative_error(same_weights, exact) < 0.04


def test_naive_keeps_basis_and_gains(decoder):
    ids = torch.randint(0, decoder.config.vocab_size, (2, 20))
    naive = quantize_backbone(decoder, rotate=False)
    assert naive.rotation is None
    assert torch.equal(naive.layers[0].input_norm, decoder.layers[0].input_layernorm.weight)
    assert relative_error(states(naive, ids), states(decoder, ids)) < 0.08


def test_sliding_window_is_seen(decoder):
    """Tokens beyond Mistral's window of 8 (per layer) cannot matter; with the others they do."""
    int8 = quantize_backbone(decoder)
    int8.layers = int8.layers[:1]
    ids = torch.randint(0, decoder.config.vocab_size, (1, 30))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % decoder.config.vocab_size
    same = torch.equal(states(int8, ids)[0, 20], states(int8, changed)[0, 20])
    assert same == (decoder.config.model_type == "mistral")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_piece_is_row_by_row(decoder, dtype):
    int8 = quantize_backbone(decoder, dtype=dtype)
    s, layer = int8.shape, int8.layers[0]
    ids = torch.randint(0, decoder.config.vocab_size, (700,))
    x = int8.embed(ids)
    attended = torch.randn(700, s.heads * s.head_dim).to(dtype)

    def run(rows):
        part = x[rows]
        return (
            int8.embed(ids[rows]),
            *layer.attention_inputs(part),
            layer.attention_output(part, attended[rows]),
            layer.mlp(part),
            int8.restore(part),
        )

    before = torch.get_num_threads()
    whole = run(slice(None))
    assert whole[1].dtype == dtype
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for rows in (slice(0, 1), slice(699, 700), slice(3, 10), slice(100, 643)):
                for part, full in zip(run(rows), whole, strict=True):
                    assert torch.equal(part, full[rows])
    finally:
        torch.set_num_threads(before)


def test_long_mlp_is_cut_into_parts(decoder, monkeypatch):
    from sarm.quantization import layer as module

    int8 = quantize_backbone(decoder)
    x = torch.randn(50, decoder.config.hidden_size)
    whole = int8.layers[0].mlp(x)
    monkeypatch.setattr(module, "_GATE_UP_ELEMENTS", 7 * 2 * decoder.config.intermediate_size)
    monkeypatch.setattr(module, "_MLP_ROWS", 1)
    assert torch.equal(int8.layers[0].mlp(x), whole)


def test_scoring_code_takes_it_for_a_backbone(decoder):
    int8 = quantize_backbone(decoder)
    rows = [torch.randint(0, 300, (n,)).tolist() for n in (5, 17, 9)]
    for indices, ours in iter_last_states(int8, rows):
        for i, state in zip(indices, ours, strict=True):
            alone = states(int8, torch.tensor([rows[i]]))[0, -1]
            torch.testing.assert_close(state, alone, atol=0.05, rtol=0.05)


def test_reference_backend_agrees(decoder):
    ids = torch.randint(0, decoder.config.vocab_size, (2, 12))
    ours = states(quantize_backbone(decoder), ids)
    with ops.use_backend("reference"):
        theirs = states(quantize_backbone(decoder), ids)
    assert relative_error(ours, theirs) < 0.02  # a step at the border of two, passed on


def test_consume_empties_the_backbone(decoder):
    ids = torch.randint(0, decoder.config.vocab_size, (1, 9))
    expected = states(quantize_backbone(decoder), ids)
    ours = quantize_backbone(decoder, consume=True)
    assert torch.equal(states(ours, ids), expected)
    assert all(parameter.is_meta for parameter in decoder.parameters())


def test_state_dict_round_trip(decoder):
    first = quantize_backbone(decoder)
    other = copy.deepcopy(decoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    second = quantize_backbone(other)
    ids = torch.randint(0, decoder.config.vocab_size, (1, 9))
    assert not torch.equal(states(first, ids), states(second, ids))
    second.load_state_dict(first.state_dict())
    assert torch.equal(states(first, ids), states(second, ids))


def test_refusals(tiny_config):
    gemma = AutoModel.from_config(tiny_config("gemma2"))
    text = 'quantization "int8": gemma2 is not supported (its norms after attention and MLP do not'
    with pytest.raises(InputError, match=re.escape(text)):
        quantize_backbone(gemma)
    gelu = AutoModel.from_config(tiny_config("llama", hidden_act="gelu"))
    text = "quantization \"int8\": the MLP activation must be silu, got 'gelu'"
    with pytest.raises(InputError, match=re.escape(text)):
        quantize_backbone(gelu)
    llama = AutoModel.from_config(tiny_config("llama"))
    layer = {**llama.layers[0].state_dict(), "self_attn.sinks": torch.zeros(4)}
    decoder = Int8Decoder(llama.config, llama.rotary_emb, llama.embed_tokens.weight)
    with pytest.raises(InputError, match=r"unknown tensors in a layer: self_attn\.sinks"):
        decoder.add_layer(layer)


def test_states_with_a_prefix_cache_have_the_bits_of_those_without(decoder):
    int8 = quantize_backbone(decoder)
    assert unpackable(int8) is None
    cache = PrefixCache(1 << 24)
    prompt = torch.randint(0, 300, (70,)).tolist()
    for step in range(3):
        rows = [[*prompt, *torch.randint(0, 300, (n,)).tolist()] for n in (5, 40, 9)]
        cold, warm = torch.empty(2, 3, decoder.config.hidden_size)
        for indices, part in iter_last_states(int8, rows):
            cold[indices] = part
        for indices, part in iter_last_states(int8, rows, 50, cache=cache):
            warm[indices] = part
        assert torch.equal(cold, warm)
        assert cache.stats().tokens_saved == 64 * step
