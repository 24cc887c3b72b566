"""8-bit models from files: quantised while reading, saved, read back; what is refused."""

import gc
import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from sarm import SarmForSequenceClassification, SARMScorer, load_backbone
from sarm.calibration import ONE_PASS, calibrate, rows_for
from sarm.errors import InputError
from sarm.packing import last_states
from sarm.quantization import Int8Decoder, loading, quantize_backbone
from sarm.weights import SafetensorsSource

INT8 = {"quantization": "int8", "device": "cpu"}
ROWS = [[5, 9, 2, 44, 2], [7], [5, 9, 2, 44, 8, 1], list(range(3, 33)), [5, 9, 2, 44, 2]]


def states_of(backbone):
    return last_states(backbone, ROWS)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert {n: t.dtype for n, t in a.items()} == {n: t.dtype for n, t in b.items()}
    return all(torch.equal(a[n], b[n]) for n in a)


# ---- backbones -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_while_reading(kind, dtype, backbone_dir):
    folder = backbone_dir(kind, dtype=dtype)
    ours = load_backbone(folder, dtype=dtype, **INT8)
    plain = load_backbone(folder, dtype=dtype, device="cpu")
    assert isinstance(ours, Int8Decoder)
    assert equal(ours, quantize_backbone(plain))
    assert ours.load_report == plain.load_report
    assert ours.config.dtype == dtype


def test_at_most_one_linear_in_floating_point(backbone_dir, monkeypatch):
    seen, sizes = [], []
    folder = backbone_dir()
    read = loading.read_checked

    def alive():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        own = [t for t in tensors if t.is_floating_point() and t.device.type == "cpu"]
        return sum({t.data_ptr(): t.nbytes for t in own}.values())

    def watch(*args, **options):
        tensor = read(*args, **options)
        if tensor.ndim == 2 and len(sizes) > 0:
            seen.append(alive())
        sizes.append(tensor.nbytes)
        return tensor

    before = alive()
    monkeypatch.setattr(loading, "read_checked", watch)
    decoder = load_backbone(folder, layer=6, dtype=torch.float32, **INT8)
    assert len(decoder.layers) == 6
    assert len(seen) == 6 * 7
    assert max(seen) - before < decoder.embedding.nbytes + 2 * max(sizes[1:])


def test_smaller_embedding_and_attention_dtype(backbone_dir):
    ours = load_backbone(backbone_dir(), dtype=torch.bfloat16, **INT8)
    assert ours.embedding.dtype == ours.layers[0].dtype == torch.bfloat16
    assert ours.layers[0].down.scale.dtype == torch.float32
    exact = load_backbone(backbone_dir(), dtype=torch.float32, device="cpu")
    error = (states_of(ours) - states_of(exact)).norm() / states_of(exact).norm()
    assert error < 0.06


def test_gguf(smollm2):
    ours = load_backbone(smollm2, 1, dtype=torch.float32, **INT8)
    plain = load_backbone(smollm2, 1, dtype=torch.float32)
    expected = quantize_backbone(plain)
    rows = rows_for(smollm2, plain.config.vocab_size)
    calibrate(expected, rows, last_states(plain, rows, ONE_PASS))
    assert equal(ours, expected)


@pytest.mark.parametrize("quantization", ["int8", "bnb-int8"])
def test_gemma(quantization, backbone_dir):
    if quantization == "int8":
        with pytest.raises(InputError, match='quantization "int8": gemma2 is not supported'):
            load_backbone(backbone_dir("gemma2"), **INT8)
    else:
        load_backbone(backbone_dir("gemma2"), quantization=quantization, device="cpu")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t[:, :5].clone(), "has shape (32, 5), expected (32, 32)"),
        (lambda t: t.to(torch.int8), "is stored as int8; quantised checkpoints cannot be read"),
        (lambda t: t * torch.nan, "holds NaN or infinite values in float32"),
        (None, "tensor model.layers.1.self_attn.q_proj.weight is missing"),
    ],
)
def test_damaged_files(change, text, backbone_dir):
    folder, name = backbone_dir(), "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=re.escape(text)):
        load_backbone(folder, **INT8)


# ---- SARMs ---------------------------------------------------------------------------------


@pytest.fixture
def saved(make_sarm, tokenizer, tmp_path):
    """saved(**options): folder of a SARM in floating point."""

    def make(**options):
        folder = tmp_path / "float"
        SARMScorer(make_sarm(**options), tokenizer).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("activation", ["topk", "none"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_sarm_is_quantised_saved_and_read_back(activation, kind, saved, tmp_path, chat):
    folder = saved(activation=activation, kind=kind, n_rewards=2)
    plain = SarmForSequenceClassification.from_pretrained(folder, device="cpu")
    scorer = SARMScorer.from_pretrained(folder, **INT8)
    model = scorer.model
    expected = quantize_backbone(plain.model)
    rows = rows_for(folder, plain.config.vocab_size)
    calibrate(expected, rows, last_states(plain.model, rows, ONE_PASS))
    assert equal(model.model, expected)
    assert equal(model.sae, plain.sae)
    assert torch.equal(model.score.weight, plain.score.weight)
    talks = [chat("hi", "hello"), chat("the quick", "brown fox"), chat("hi", "jumps")]
    rewards = scorer.score(talks)
    scorer.save_pretrained(tmp_path / "int8")
    shutil.rmtree(folder)  # nothing of the original is needed
    for options in ({}, INT8):
        again = SARMScorer.from_pretrained(tmp_path / "int8", **options)
        assert equal(again.model, model)
        assert torch.equal(again.score(talks), rewards)
        assert again.model.config.to_dict() == model.config.to_dict()
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert equal(auto, model)
    ids = torch.tensor([ROWS[3], ROWS[3][::-1]])
    assert torch.equal(auto(ids).logits, model(ids).logits)


def test_files_of_an_int8_checkpoint(saved, tmp_path):
    SARMScorer.from_pretrained(saved(), **INT8).save_pretrained(tmp_path / "int8")
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["sarm"]["quantization"] == "int8"
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    kinds = {name: t.dtype for name, t in tensors.items()}
    assert kinds["model.layers.0.qkv.weight"] == torch.int8
    assert kinds["model.layers.2.down.scale"] == torch.float32
    assert kinds["sae.encoder.weight"] == torch.float32


@pytest.mark.parametrize(
    ("stored", "sae_stored", "asked"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, None),
        (torch.bfloat16, torch.float32, None),
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_dtypes(stored, sae_stored, asked, native, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    folder = saved(dtype=stored, sae_dtype=sae_stored)
    model = SarmForSequenceClassification.from_pretrained(folder, dtype=asked, **INT8)
    plain = SarmForSequenceClassification.from_pretrained(folder, dtype=asked, device="cpu")
    assert model.model.attention_dtype == plain.model.dtype
    assert equal(model.sae, plain.sae)
    model.save_pretrained(tmp_path / "int8")
    read = SarmForSequenceClassification.from_pretrained
    assert equal(read(tmp_path / "int8", dtype=asked, device="cpu"), model)


def test_refusals(saved, tmp_path):
    SARMScorer.from_pretrained(saved(), **INT8).save_pretrained(tmp_path / "int8")
    with pytest.raises(InputError, match=r'saved in 8 bits \("int8"\), cannot become "bnb-int8"'):
        SARMScorer.from_pretrained(tmp_path / "int8", quantization="bnb-int8")
    config = tmp_path / "int8" / "config.json"
    config.write_text(config.read_text().replace('"int8"', '"int3"'))
    with pytest.raises(InputError, match=r"sarm\.quantization must be one of"):
        SARMScorer.from_pretrained(tmp_path / "int8")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ({"model.layers.1.o.scale": None}, "tensor model.layers.1.o.scale is missing"),
        ({"model.layers.1.o.weight": torch.zeros(32, 32)}, "stored as float32, expected int8"),
        ({"model.layers.1.o.scale": torch.zeros(31)}, "has shape (31,), expected (32,)"),
        ({"model.embedding": torch.full((300, 32), torch.inf)}, "holds NaN or infinite values"),
        ({"model.layers.1.extra": torch.zeros(1)}, "unexpected tensor model.layers.1.extra (1 in"),
        ({"score.weight": None}, "tensor score.weight is missing"),
        ({"model.scored_ids": torch.zeros(1)}, "stored as float32, expected int64"),
        ({"model.offsets": torch.zeros(2, 32)}, "has shape (2, 32), expected (1, 32)"),
        ({"model.offsets": None}, "tensor model.offsets is missing"),
    ],
)
def test_damaged_int8_files(damage, text, saved, tmp_path):
    SARMScorer.from_pretrained(saved(), **INT8).save_pretrained(tmp_path / "int8")
    file = tmp_path / "int8" / "model.safetensors"
    tensors = {n: t for n, t in (load_file(file) | damage).items() if t is not None}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=re.escape(text)):
        SARMScorer.from_pretrained(tmp_path / "int8")


def test_layers_beyond_the_cut_are_passed_over(saved):
    folder = saved()
    file = folder / "model.safetensors"
    extra = {"model.layers.9.mlp.gate.weight": torch.zeros(2), "model.norm.weight": torch.ones(32)}
    save_file(load_file(file) | extra, file, {"format": "pt"})
    SarmForSequenceClassification.from_pretrained(folder, **INT8)


@pytest.mark.parametrize("template", [True, False])
def test_float_files_are_read_twice_at_most(template, saved, monkeypatch):
    """Once to quantise and, where there is a template to calibrate with, once for the layers."""
    read, counted = SafetensorsSource.read, []
    monkeypatch.setattr(
        SafetensorsSource, "read", lambda self, name: counted.append(name) or read(self, name)
    )
    folder = saved()
    if not template:
        (folder / "chat_template.jinja").unlink()
    SarmForSequenceClassification.from_pretrained(folder, **INT8)
    twice = {name for name in counted if counted.count(name) == 2}
    assert all(name.startswith(("model.layers.", "model.embed_tokens")) for name in twice)
    assert len(counted) == len(set(counted)) + len(twice)
    assert bool(twice) == template


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_without_the_decoder(quantization, saved, tmp_path, chat, monkeypatch):
    folder, options = saved(), {"quantization": quantization, "device": "cpu"}
    whole = SARMScorer.from_pretrained(folder, **options)
    read, names = SafetensorsSource.read, []
    monkeypatch.setattr(
        SafetensorsSource, "read", lambda self, name: names.append(name) or read(self, name)
    )
    scorer = SARMScorer.from_pretrained(folder, decoder=False, **options)
    assert "sae.decoder.weight" not in names
    assert all(p.device.type == "cpu" for p in scorer.model.parameters())
    talks = [chat("hi", "hello"), chat("the quick", "brown fox")]
    assert torch.equal(scorer.score(talks), whole.score(talks))
    assert scorer.explain(talks[0]) == whole.explain(talks[0])
    latents = scorer.latents(talks)
    with pytest.raises(InputError, match="loaded without its decoder"):
        scorer.model.sae.decode(latents)
    with pytest.raises(InputError, match="without its SAE's decoder cannot be saved"):
        scorer.save_pretrained(tmp_path / "s")
    assert not (tmp_path / "s").exists()


# ---- bitsandbytes --------------------------------------------------------------------------


def test_bnb(saved, chat, tmp_path):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear8bitLt

    folder = saved()
    plain = SARMScorer.from_pretrained(folder, device="cpu")
    ours = SARMScorer.from_pretrained(folder, quantization="bnb-int8", device="cpu")
    linears = [m for m in ours.model.modules() if isinstance(m, torch.nn.Linear)]
    eight = [m for m in linears if isinstance(m, Linear8bitLt)]
    assert len(eight) == 7 * len(ours.model.model.layers)
    assert all(m.weight.dtype == torch.int8 and m.state.threshold == 0.0 for m in eight)
    assert ours.model.sae.encoder in linears
    assert ours.model.sae.encoder not in eight
    latents = [scorer.latents([chat("hi", "hello there")]) for scorer in (plain, ours)]
    torch.testing.assert_close(latents[1].vals, latents[0].vals, rtol=0.2, atol=0.2)
    assert not torch.equal(latents[1].vals, latents[0].vals)
    with pytest.raises(InputError, match='"bnb-int8" is made while loading and cannot be saved'):
        ours.save_pretrained(tmp_path / "bnb")
    assert not (tmp_path / "bnb").exists()


def test_bnb_is_not_installed(backbone_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(InputError, match=r'needs bitsandbytes: pip install "sarm\[bnb\]"'):
        load_backbone(backbone_dir(), quantization="bnb-int8", device="cpu")
