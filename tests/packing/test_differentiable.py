"""The packed forward with gradients: states and gradients of the padded transformers forward."""

import pytest
import torch

import sarm
from sarm.errors import InputError
from sarm.packing import differentiable, lean, pad_right
from sarm.packing.batch import PackedBatch
from sarm.packing.differentiable import layers_kept, packed_attention, wanted_states

WINDOWED = {"sliding_window": 6}
DRAW = torch.Generator().manual_seed(0)


def ids(count):
    return torch.randint(0, 60, (count,), generator=DRAW).tolist()


PROMPT, ANSWER = ids(9), ids(5)
ROWS = [PROMPT + ANSWER, PROMPT + ids(7), PROMPT, ids(4), PROMPT + ANSWER + ids(2)]
ROWS.append(ROWS[0])
STARTS = [9, 7, 3, 2, 13, 11]


def test_a_batch_has_shared_tokens_once_and_counts_who_wants_them():
    batch = PackedBatch.of(ROWS, STARTS)
    assert len(batch.ids) == 9 + 7 + 7 + 4  # PROMPT; ANSWER and 2 more; 7; 4
    assert batch.weights.sum() == sum(len(row) - s for row, s in zip(ROWS, STARTS, strict=True))
    last = batch.ids[batch.wanted[batch.scored]]
    assert last.tolist() == [row[-1] for row in ROWS]
    assert batch.positions[batch.wanted[batch.scored]].tolist() == [len(row) - 1 for row in ROWS]


def test_without_starts_the_last_tokens_alone_are_wanted():
    batch = PackedBatch.of(ROWS)
    assert len(batch.wanted) == 5  # two rows are the same
    assert batch.weights.sum() == len(ROWS)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("mistral", WINDOWED), ("qwen3", {}), ("gemma2", WINDOWED)],
)
def test_states_and_gradients_are_those_of_padded_rows(
    kind, changes, checkpointing, backbone_dir, monkeypatch
):
    monkeypatch.setattr(lean, "CHUNK", 4)
    backbone = sarm.load_backbone(backbone_dir(kind, **changes), 3, dtype=torch.float32).double()
    backbone.train()
    batch = PackedBatch.of(ROWS, STARTS)
    if checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
    with packed_attention(backbone):
        states = wanted_states(backbone, batch)
        (states.sin() * batch.weights[:, None]).sum().backward()
    if checkpointing:
        backbone.gradient_checkpointing_disable()
    ours = {name: p.grad.clone() for name, p in backbone.named_parameters()}
    backbone.zero_grad()
    padded, _ = pad_right(ROWS, backbone.device)
    hidden = backbone(input_ids=padded, use_cache=False).last_hidden_state
    wanted = [hidden[i, s : len(row)] for i, (s, row) in enumerate(zip(STARTS, ROWS, strict=True))]
    torch.cat(wanted).sin().sum().backward()
    last = torch.stack([w[-1] for w in wanted])
    torch.testing.assert_close(states[batch.scored], last, rtol=1e-5, atol=1e-5)
    for name, p in backbone.named_parameters():
        scale = p.grad.abs().max()
        torch.testing.assert_close(ours[name] / scale, p.grad / scale, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("padding", [None, 3])
def test_gradients_add_up_over_passes(padding, backbone_dir, monkeypatch):
    """In fp32, through the kernels; embeddings go by rows, and a padding token has no gradient."""
    backbone = sarm.load_backbone(backbone_dir("llama"), 3, dtype=torch.float32)
    backbone.embed_tokens.padding_idx = padding
    batches = [PackedBatch.of([[3, *row] for row in rows]) for rows in (ROWS[:2], ROWS[2:])]

    def gradients():
        backbone.zero_grad()
        with packed_attention(backbone):
            for batch in batches:
                wanted_states(backbone, batch).sin().sum().backward()
        return {name: p.grad for name, p in backbone.named_parameters()}

    found = gradients()
    monkeypatch.setattr(lean, "is_lean", lambda layer: False)
    monkeypatch.setattr(differentiable, "is_lean", lambda layer: False)
    monkeypatch.setattr(differentiable, "embedded", lambda table, ids: table(ids))
    for name, wanted in gradients().items():
        size = wanted.abs().max()
        torch.testing.assert_close(found[name] / size, wanted / size, rtol=0, atol=1e-5, msg=name)
    assert (found["embed_tokens.weight"][3].abs().max() == 0) == (padding == 3)


def test_only_what_exceeds_the_kept_tokens_is_computed_again(backbone_dir, monkeypatch):
    backbone = sarm.load_backbone(backbone_dir("llama"), 4, dtype=torch.float32).train()
    batch = PackedBatch.of([list(range(30))])
    backbone.gradient_checkpointing_enable({"use_reentrant": False})
    attend, runs = lean.LeanLayer.attend, []
    monkeypatch.setattr(lean.LeanLayer, "attend", lambda *args: runs.append(0) or attend(*args))
    found = {}
    for kept in (None, 3, 12, 21, 30):
        backbone.zero_grad()
        with packed_attention(backbone):
            states = wanted_states(backbone, batch, kept)
            runs.clear()
            states.sum().backward()
        found[kept] = len(runs)
    assert found == {None: 4, 3: 4, 12: 2, 21: 1, 30: 0}  # the last only where all others are


@pytest.mark.parametrize("kept", [1, 100, 1024, 5000])
def test_the_kept_layers_fit_into_the_space_of_the_kept_tokens(kept):
    """In units of a layer's input: 10 to keep a layer, 1 to compute it again."""
    for tokens in (1, 99, 100, 1024, 1500, 4096, 8192, 40000):
        layers = layers_kept(14, tokens, kept)
        needed = tokens * (10 * layers + (14 - layers))
        assert 0 <= layers <= 14
        assert layers == 0 or needed <= 10 * 14 * kept
        assert layers == 14 or needed + 9 * tokens > 10 * 14 * kept


def test_a_layer_that_is_computed_again_keeps_its_input_alone(backbone_dir):
    backbone = sarm.load_backbone(backbone_dir("llama"), 4, dtype=torch.float32).train()
    batch = PackedBatch.of([ids(40)])
    weights = {p.data_ptr() for p in backbone.parameters()}
    sizes: dict[bool, int] = {}
    for again in (False, True):
        kept = {}

        def seen(tensor, kept=kept):
            if tensor.data_ptr() not in weights:
                kept[tensor.data_ptr()] = tensor
            return tensor

        if again:
            backbone.gradient_checkpointing_enable({"use_reentrant": False})
        with (
            packed_attention(backbone),
            torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor),
        ):
            wanted_states(backbone, batch)
        sizes[again] = sum(t.numel() for t in kept.values() if t.is_floating_point())
    width = backbone.config.hidden_size
    assert sizes[True] <= 40 * width * 4 + 4 * width + 40  # four inputs; the final norm's row
    assert sizes[False] > 2 * sizes[True]


def test_weights_that_do_not_learn_get_no_gradient_from_layers_computed_again(backbone_dir):
    backbone = sarm.load_backbone(backbone_dir("llama"), 3, dtype=torch.float32).train()
    batch = PackedBatch.of(ROWS, STARTS)
    fixed = ["mlp.down_proj.weight", "self_attn.q_proj.weight", "input_layernorm.weight"]

    def gradients():
        backbone.zero_grad()
        with packed_attention(backbone):
            wanted_states(backbone, batch).sin().sum().backward()
        return {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}

    for name in fixed:
        backbone.layers[1].get_parameter(name).requires_grad_(False)
    plain = gradients()
    backbone.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert len(plain) == len(list(backbone.parameters())) - len(fixed)
    for name, gradient in plain.items():
        size = gradient.abs().max()
        torch.testing.assert_close(again[name] / size, gradient / size, rtol=0, atol=1e-5, msg=name)


def test_afterwards_the_backbone_attends_as_before(tiny_backbone):
    before = tiny_backbone.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), packed_attention(tiny_backbone):
        raise RuntimeError("stop")
    assert tiny_backbone.config._attn_implementation == before


def test_what_cannot_be_packed_is_refused(tiny_backbone, monkeypatch):
    monkeypatch.setattr(tiny_backbone.rotary_emb, "rope_type", "dynamic")
    with (
        pytest.raises(InputError, match="'dynamic' depends on the length"),
        packed_attention(tiny_backbone),
    ):
        pass
