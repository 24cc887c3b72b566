"""Modes 0 to 3: the published losses, resumed runs, LoRA, and what is refused."""

import copy
import math

import pytest
import tiny_sarm
import torch
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

from sarm.backbone import load_backbone
from sarm.data import Record, to_pair
from sarm.errors import InputError
from sarm.modeling import SarmForSequenceClassification
from sarm.packing.differentiable import packed_attention
from sarm.sae import TopKSAE
from sarm.scorer import SARMScorer
from sarm.tokens import ConversationEncoder
from sarm.training import trainer as trainer_module
from sarm.training.adapters import add_lora, merge_lora
from sarm.training.collate import PairDataset, collate, turn_start, wanted_tokens
from sarm.training.end_to_end import save_pairs, train_pairs
from sarm.training.modes import PairModel
from sarm.training.reference import published_loss
from sarm.training.trainer import PairTrainConfig, PairTrainer

ROWS = [{**row, "margin": 0.1 * i} for i, row in enumerate(tiny_sarm.make_pairs(24))]
RATES = {"lr": 1e-3, "lr_sae": 2e-3, "lr_head": 3e-3}


def pairs_of(rows):
    return [to_pair(Record(f"pairs.jsonl:{i + 1}", row)) for i, row in enumerate(rows)]


@pytest.fixture
def dataset(tokenizer, backbone):
    def make(rows=ROWS, turns=True, **options):
        encoder = ConversationEncoder(tokenizer, 512)
        size = backbone.config.vocab_size
        return PairDataset(pairs_of(rows), encoder, size, turns=turns, **options)

    return make


@pytest.fixture
def parts(backbone_dir):
    """(backbone, SAE, head), new but equal at every call."""

    def make():
        torch.manual_seed(0)
        return load_backbone(backbone_dir), TopKSAE(32, 128, 8), 0.1 * torch.randn(1, 128)

    return make


@pytest.fixture
def trained(parts, dataset, tmp_path):
    def run(mode=1, out="run", rows=ROWS, valid=None, **settings):
        backbone, sae, head = parts()
        options = {"epochs": 2, "batch_size": 8, "micro_batch": 4, **RATES, **settings}
        config = PairTrainConfig(mode, **options)
        held = None if valid is None else dataset(valid)
        data = dataset(rows)
        return train_pairs(backbone, sae, data, config, tmp_path / out, valid=held, head=head)

    return run


def losses(fit):
    return [entry["loss"] for entry in fit.log if "loss" in entry]


def published_run(model, batches, mode, config):
    """The losses of a plain loop: AdamW, cosine schedule, clipping."""
    model.requires_grad_(False)
    learning = {"score": config.lr_head}
    learning |= {"model": config.lr} if mode > 0 else {}
    learning |= {"sae": config.lr_sae} if mode > 1 else {}
    groups = []
    for name, p in model.named_parameters():
        if name.split(".")[0] in learning:
            p.requires_grad_(True)
            decay = config.weight_decay if p.ndim > 1 else 0.0
            groups.append(
                {"params": [p], "lr": learning[name.split(".")[0]], "weight_decay": decay}
            )
    optimizer = torch.optim.AdamW(groups)
    warmup = math.ceil(config.warmup * len(batches))
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, len(batches))
    found = []
    for pairs in batches:
        optimizer.zero_grad()
        loss, _ = published_loss(
            model, pairs, mode, centre=config.centre, weight=config.reconstruction_weight
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], config.clip)
        optimizer.step()
        schedule.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_the_loss_of_several_pairs_is_the_mean_of_theirs(mode, parts, dataset):
    """Pairs of unequal length weigh the same, so micro-batches do not change a step."""
    backbone, sae, head = parts()
    model = PairModel(SarmForSequenceClassification.from_parts(backbone, sae, head[:1]), mode)
    pairs = dataset().pairs[:5]
    assert len({wanted_tokens(pair) for pair in pairs}) > 1
    with packed_attention(backbone):
        batches = [collate(pairs), *(collate([pair]) for pair in pairs)]
        together, *alone = (
            model(margins=b["margins"], batch=b["batch"])["loss"].item() for b in batches
        )
    assert together == pytest.approx(sum(alone) / 5, rel=1e-6)


@pytest.mark.parametrize("turns", [True, False], ids=["turn", "last"])
@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_the_loss_curve_is_the_published_one(mode, turns, parts, dataset, tmp_path, monkeypatch):
    config = PairTrainConfig(
        mode, epochs=3, batch_size=4, warmup=0.1, centre=0.01, weight_decay=0.01,
        reconstruction_weight=0.7, **RATES,
    )  # fmt: skip
    seen, compute = [], PairTrainer.compute_loss

    def watched(self, model, inputs, **options):
        seen.append(inputs["where"])
        return compute(self, model, inputs, **options)

    monkeypatch.setattr(PairTrainer, "compute_loss", watched)
    backbone, sae, head = parts()
    theirs = SarmForSequenceClassification.from_parts(*copy.deepcopy((backbone, sae, head)))
    data = dataset(turns=turns)
    fit = train_pairs(backbone, sae, data, config, tmp_path, head=head)
    by_place = {pair.where: pair for pair in data.pairs}
    batches = [[by_place[where] for where in batch] for batch in seen]
    assert len(losses(fit)) == 18
    assert losses(fit) == pytest.approx(published_run(theirs, batches, mode, config), rel=2e-5)
    ours = fit.model.state_dict()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_only_what_a_mode_trains_changes(trained, parts):
    backbone, sae, head = parts()
    before = SarmForSequenceClassification.from_parts(backbone, sae, head).state_dict()
    expected = {
        0: {"score"},
        1: {"score", "model"},
        2: {"score", "model", "sae"},
        3: {"score", "model", "sae"},
    }
    for mode, changes in expected.items():
        after = trained(mode, out=f"mode-{mode}", epochs=1).model.state_dict()
        changed = {n.split(".")[0] for n, t in after.items() if not torch.equal(t, before[n])}
        assert changed == changes


def test_in_mode_3_the_reconstruction_leaves_the_backbone_alone(trained):
    one_step = {"epochs": 1, "batch_size": 24, "micro_batch": 24, "clip": 0.0, "warmup": 0.0}
    strong = trained(3, out="a", **one_step)
    weak = trained(3, out="b", reconstruction_weight=0.0, **one_step)
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(strong.model.model.state_dict()[name], weak.model.model.state_dict()[name])
    assert not torch.equal(strong.model.sae.w_dec, weak.model.sae.w_dec)


def test_a_planted_signal_is_learnt_and_the_best_checkpoint_kept(trained, tokenizer, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "margin"} for row in ROWS]
    held = tiny_sarm.make_pairs(20, seed=1)
    fit = trained(1, rows=rows, valid=held, epochs=4, batch_size=4, eval_every=6, lr=3e-3)
    assert fit.held_out["eval_accuracy"] > 0.8
    save_pairs(fit, tokenizer, tmp_path / "run", {})
    assert not (tmp_path / "run" / ".progress").exists()
    scorer = SARMScorer.from_pretrained(tmp_path / "run")
    rewards = scorer.score([side for p in pairs_of(held) for side in (p.chosen, p.rejected)])
    right = (rewards[0::2] > rewards[1::2]).double().mean().item()
    assert right == pytest.approx(fit.held_out["eval_accuracy"])


def test_early_stopping(trained):
    held = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in ROWS[:8]]
    held = [{k: v for k, v in r.items() if k != "margin"} for r in held]
    fit = trained(1, valid=held, epochs=20, batch_size=24, eval_every=1, patience=2, lr=3e-3)
    assert len(losses(fit)) < 10  # reversed preferences only get worse


# ---- interruptions -------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("mode", [1, 3])
def test_a_resumed_run_ends_with_the_same_weights(mode, trained, monkeypatch):
    """Killed inside the second epoch; a checkpoint that was being written is passed over."""
    whole = trained(mode, out="whole", epochs=3, eval_every=2).model.state_dict()
    compute, steps = PairTrainer.compute_loss, []

    def dies(self, *args, **options):
        steps.append(self.state.global_step)
        if self.state.global_step == 5:
            (trainer_module.Path(self.args.output_dir) / "checkpoint-5").mkdir()
            raise Killed
        return compute(self, *args, **options)

    monkeypatch.setattr(PairTrainer, "compute_loss", dies)
    with pytest.raises(Killed):
        trained(mode, out="killed", epochs=3, eval_every=2)
    resumed = []
    monkeypatch.setattr(
        PairTrainer,
        "compute_loss",
        lambda self, *a, **o: resumed.append(self.state.global_step) or compute(self, *a, **o),
    )
    fit = trained(mode, out="killed", epochs=3, eval_every=2)
    assert min(resumed) == 4
    for name, tensor in fit.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_a_folder_with_another_run_is_refused(trained, monkeypatch):
    trained(1)
    with pytest.raises(InputError, match=r"holds a run with lr=0.001 \(now 0.002\); choose"):
        trained(1, lr=2e-3)
    with pytest.raises(InputError, match="holds a run with pairs="):
        trained(1, rows=ROWS[:20])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_no_number_names_its_batch_and_keeps_the_checkpoint(
    value, trained, monkeypatch, tmp_path
):
    found = trainer_module.PairModel.forward

    def broken(self, margins, batch):
        out = found(self, margins, batch)
        return out | {"loss": out["loss"] * (value if margins.max() > 2.2 else 1)}

    monkeypatch.setattr(trainer_module.PairModel, "forward", broken)
    says = rf"the loss is {value} at step \d+ .*pairs\.jsonl:24.*is kept"
    with pytest.raises(InputError, match=says):
        trained(1, batch_size=4, eval_every=1, seed=1)
    (kept,) = {p.parent for p in (tmp_path / "run").rglob("whole.json")} & {
        max((tmp_path / "run" / ".progress").glob("checkpoint-*"))
    }
    assert all(t.isfinite().all() for t in load_file(kept / "trained.safetensors").values())


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(trained, monkeypatch, tmp_path):
    save, calls = trainer_module.save_file, []

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(trainer_module, "save_file", full)
    with pytest.raises(InputError, match=r"checkpoint-3: cannot be written .*No space.*-2 is kept"):
        trained(1, eval_every=1)
    assert not (tmp_path / "run" / ".progress" / "checkpoint-3").exists()


def test_a_gradient_that_is_infinite_stops_before_the_step(trained, monkeypatch, tmp_path):
    """A finite loss may have such a gradient; the step would make all weights NaN."""
    clip = trainer_module.Trainer._clip_grad_norm

    def broken(self, model):
        if self.state.global_step == 2:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.inf
        return clip(self, model)

    monkeypatch.setattr(trainer_module.Trainer, "_clip_grad_norm", broken)
    with pytest.raises(InputError, match=r"gradient's norm is inf at step 2; .*-2 is kept"):
        trained(1, batch_size=4, eval_every=1)
    (kept,) = (tmp_path / "run" / ".progress" / "checkpoint-2").glob("*.safetensors")
    assert all(t.isfinite().all() for t in load_file(kept).values())


@pytest.mark.parametrize("k", [8, 128])
def test_bf16_differs_by_the_latents_it_chooses(k, parts, dataset):
    """Rounded states swap latents at the border of the k; where all are active, rounding is all."""
    backbone, _, head = parts()
    torch.manual_seed(0)
    model = PairModel(
        SarmForSequenceClassification.from_parts(backbone, TopKSAE(32, 128, k), head), 1
    )
    inputs = collate(dataset().pairs)
    found = {}
    with packed_attention(backbone), torch.no_grad():
        for bf16 in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                found[bf16] = model(inputs["margins"], inputs["batch"])["rewards"]
    off = (found[True] - found[False]).norm() / found[False].norm()
    assert 1e-5 < off < (2e-2 if k == 128 else 0.3)


# ---- LoRA ----------------------------------------------------------------------------------


def test_lora_trains_adapters_and_is_merged(trained, parts):
    backbone, *_ = parts()
    before = backbone.state_dict()
    after = trained(1, lora=4, lr=1e-2, checkpointing=True).model.model.state_dict()
    assert set(after) == set(before)
    assert torch.equal(after["embed_tokens.weight"], before["embed_tokens.weight"])
    delta = after["layers.0.mlp.up_proj.weight"] - before["layers.0.mlp.up_proj.weight"]
    assert 1 <= torch.linalg.matrix_rank(delta, rtol=1e-4) <= 4


def test_lora_on_an_8bit_backbone(parts, backbone_dir, dataset, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = PairTrainConfig(1, epochs=2, batch_size=8, micro_batch=4, lora=4, lr=1e-2)
    found = []
    for quantization in (None, "bnb-int8"):
        _, sae, head = parts()
        backbone = load_backbone(backbone_dir, quantization=quantization)
        kept = {n: b.clone() for n, b in backbone.named_parameters() if b.dtype == torch.int8}
        assert bool(kept) == (quantization is not None)
        fit = train_pairs(
            backbone, sae, dataset(), config, tmp_path / str(quantization), head=head,
            original=lambda: load_backbone(backbone_dir),
        )  # fmt: skip
        found.append(losses(fit))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.05)
    assert sum(found[1][-2:]) < sum(found[1][:2])
    name = "layers.0.mlp.up_proj.weight"
    delta = fit.model.model.state_dict()[name] - parts()[0].state_dict()[name]
    assert 1 <= torch.linalg.matrix_rank(delta, rtol=1e-4) <= 4


def test_a_merged_backbone_computes_what_the_adapters_did(parts):
    backbone, *_ = parts()
    original = copy.deepcopy(backbone)
    add_lora(backbone, 3)
    torch.manual_seed(1)
    for name, p in backbone.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1)
    ids = torch.arange(12)[None]
    wanted = backbone(ids).last_hidden_state
    for merged in (merge_lora(backbone, original), merge_lora(backbone)):
        torch.testing.assert_close(merged(ids).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)


# ---- data ----------------------------------------------------------------------------------


def test_the_last_turn_begins_with_the_answers_first_token(tokenizer):
    encoder = ConversationEncoder(tokenizer, 512)
    talk = pairs_of(ROWS)[0].chosen
    (encoded,) = encoder.encode([talk])
    start = turn_start(encoder, talk)
    assert tokenizer.decode(encoded.ids[start:]) == talk[-1]["content"] + "<|im_end|>"


@pytest.mark.parametrize(
    ("margins", "use", "says"),
    [
        ([1, None], None, r"pairs.jsonl:2: field 'margin' is missing \(1 of 2 pairs have one\)"),
        ([None, None], True, r"pairs.jsonl:1: field 'margin' is missing \(0 of 2"),
        ([1, "x"], None, "pairs.jsonl:2: margin must be a number >= 0, got 'x'"),
        ([1, -1], None, "pairs.jsonl:2: margin must be a number >= 0, got -1"),
        ([math.nan, 1], None, "pairs.jsonl:1: margin must be a number >= 0, got nan"),
        ([0, 0], None, "margin is 0 here and in all other pairs, so all are ties"),
    ],
)
def test_margins_that_are_refused(dataset, margins, use, says):
    rows = [{**row, "margin": m} for row, m in zip(ROWS, margins, strict=False)]
    with pytest.raises(InputError, match=says):
        dataset(rows, margin=use)


def test_equal_pairs_are_left_out(dataset):
    rows = [{**ROWS[0], "rejected": ROWS[0]["chosen"]}, *ROWS[1:3]]
    data = dataset(rows)
    assert (len(data), data.equal) == (2, 1)
    assert [pair.margin for pair in data.pairs] == [0.1, 0.2]
    with pytest.raises(InputError, match="no pair whose chosen and rejected differ"):
        dataset(rows[:1], margin=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": 4}, "mode must be one of 0, 1, 2, 3, got 4"),
        ({"batch_size": 6, "micro_batch": 4}, "multiple of micro_batch x processes = 4 x 1, got 6"),
        ({"lr": 0}, "lr must be positive, got 0"),
        ({"patience": 2}, "patience needs a held-out set"),
        ({"reconstruction": "all"}, "reconstruction must be one of turn, last, got 'all'"),
        ({"mode": 0, "lora": 4}, "in mode 0 it does not"),
        ({"lora": 0}, "rank must be at least 1, got 0"),
    ],
)
def test_settings_that_are_refused(trained, settings, says):
    with pytest.raises(InputError, match=says):
        trained(**settings)
