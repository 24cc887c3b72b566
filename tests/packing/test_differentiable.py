"""The packed forward with gradients: states and gradients of the padded transformers forward."""

import pytest
import torch

import sarm
from sarm.errors import InputError
from sarm.packing import differentiable, lean, pad_right
from sarm.packing.batch import PackedBatch
from sarm.packing.differentiable import packed_attention, wanted_states

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
def test_states_and_gradients_are_those_of_padded_rows(kind, changes, checkpointing, backbone_dir):
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
    forward, runs = lean.lean_layer, []
    monkeypatch.setattr(
        lean, "lean_layer", lambda *args, **named: runs.append(0) or forward(*args, **named)
    )
    found = {}
    for kept in (None, 9, 10, 20, 30):
        runs.clear()
        backbone.zero_grad()
        with packed_attention(backbone):
            states = wanted_states(backbone, batch, kept)
            found[kept] = len(runs)
            states.sum().backward()
        found[kept] = len(runs) - found[kept]
    assert found == {None: 3, 9: 3, 10: 2, 20: 1, 30: 0}  # of the three layers before the last


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
