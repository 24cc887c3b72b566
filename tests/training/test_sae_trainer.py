"""SAE training: resumed to the bit, folded exactly, reported honestly."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_sarm
import torch

from sarm.backbone import load_backbone
from sarm.checkpoint import load_sae
from sarm.errors import InputError
from sarm.training import stream
from sarm.training.sae import SaeTrainConfig, SaeTrainer, check_origin, shuffle
from sarm.training.sae.schedule import Schedule

CONFIG = SaeTrainConfig(
    n_latents=64, k=4, activations="turn-end", chat=True, context=128,
    chunk_states=40, passes=2, batch_size=16, seed=3,
)  # fmt: skip
TEXTS = tiny_sarm.make_texts(40)


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(stream, "PIECE", 16)


@pytest.fixture
def train(backbone, tokenizer, tmp_path):
    """Run a trainer in tmp_path/name over documents (a fresh generator for every pass)."""

    def run(name="out", config=CONFIG, texts=TEXTS, backbone=backbone, prefetch=None, **callbacks):
        trainer = SaeTrainer(backbone, tokenizer, config, tmp_path / name, prefetch=prefetch)
        report = trainer.run(lambda: (t for t in texts), **callbacks)
        return trainer, report

    return run


def weights(folder):
    return load_sae(folder).state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def raise_at(call):
    seen = [0]

    def callback(_):
        seen[0] += 1
        if seen[0] == call:
            raise Killed

    return callback


@pytest.fixture
def synthetic(backbone, tokenizer, tmp_path):
    """A trainer that learns from sparse sums of known directions, without the backbone."""

    def run(config, states, name="synthetic"):
        trainer = SaeTrainer(backbone, tokenizer, config, tmp_path / name, log_every=1)
        trainer.plan(stream.Corpus(1, 1, [len(states)]))
        losses = []
        kinds = torch.zeros(len(states), dtype=torch.uint8)
        chunk = stream.Chunk(states, kinds, 1, 1)
        trainer.learn(chunk, lambda m: losses.append(m["normalized_mse"]))
        return trainer, losses

    return run


def sparse_states(n=1500, d=32, features=48, active=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(features, d, generator=draw), dim=1)
    choice = torch.rand(n, features, generator=draw).argsort(1)[:, :active]
    size = 1 + torch.rand(n, active, generator=draw)
    return (size[..., None] * directions[choice]).sum(1)


# ---- resuming ------------------------------------------------------------------------------


@pytest.fixture
def uninterrupted(train, tmp_path):
    train("whole")
    return weights(tmp_path / "whole")


@pytest.mark.parametrize("where", ["states", "step"])
@pytest.mark.parametrize("call", [1, 2, 4, 7, 9])
def test_a_killed_run_resumes_to_the_same_bits(train, tmp_path, uninterrupted, where, call):
    with pytest.raises(Killed):
        train(**{f"on_{where}": raise_at(call)})
    train()
    assert equal(weights(tmp_path / "out"), uninterrupted)


def test_a_run_killed_again_and_again_resumes_to_the_same_bits(train, tmp_path, uninterrupted):
    kills = 0
    while True:
        try:
            train(on_states=raise_at(4), on_step=raise_at(11))
            break
        except Killed:
            kills += 1
    assert kills >= 3
    assert equal(weights(tmp_path / "out"), uninterrupted)


def test_prefetch_changes_no_bit(train, tmp_path, uninterrupted):
    _, report = train(prefetch=True)
    assert report.states > 2 * CONFIG.chunk_states
    assert equal(weights(tmp_path / "out"), uninterrupted)


def test_a_run_with_prefetch_killed_again_and_again_resumes_to_the_same_bits(
    train, tmp_path, uninterrupted
):
    """Killed in the thread and out of it."""
    kills = 0
    while True:
        try:
            train(prefetch=True, on_states=raise_at(6), on_step=raise_at(11))
            break
        except Killed:
            kills += 1
    assert kills >= 2
    assert equal(weights(tmp_path / "out"), uninterrupted)


def test_a_failing_step_ends_the_thread_of_prefetch(train):
    with pytest.raises(Killed):
        train(prefetch=True, on_step=raise_at(1))
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("file", ["sae.safetensors", "trainer.safetensors"])
def test_a_kill_while_a_checkpoint_is_written(train, tmp_path, monkeypatch, uninterrupted, file):
    """Killed just before and just after a file is moved into place."""
    real = os.replace
    for after in (False, True):
        name = f"after-{after}"

        def die(source, target, after=after):
            if Path(target).name == file:
                if after:
                    real(source, target)
                raise Killed
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            with pytest.raises(Killed):
                train(name)
        train(name)
        assert equal(weights(tmp_path / name), uninterrupted)


CHILD = """
import os, signal, sys
import tiny_sarm
from sarm.backbone import load_backbone
from sarm.training import stream
from sarm.training.sae import SaeTrainConfig, SaeTrainer
folder, out, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
stream.PIECE = 16
config = SaeTrainConfig(n_latents=64, k=4, activations="turn-end", chat=True, context=128,
                        chunk_states=40, passes=2, batch_size=16, seed=3)
trainer = SaeTrainer(load_backbone(folder), tiny_sarm.make_tokenizer(), config, out)
def on_step(metrics):
    if metrics["step"] == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.run(lambda: iter(tiny_sarm.make_texts(40)), on_step=on_step)
"""


def test_a_process_killed_with_sigkill_resumes_to_the_same_bits(
    train, tmp_path, backbone_dir, uninterrupted
):
    """And the order of states does not depend on the process (PYTHONHASHSEED)."""
    helpers = Path(tiny_sarm.__file__).parent
    command = [sys.executable, "-c", CHILD, str(backbone_dir), str(tmp_path / "out"), "9"]
    environment = {**os.environ, "PYTHONPATH": str(helpers), "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "out" / ".progress" / "trainer.safetensors").exists()
    assert not (tmp_path / "out" / "sae.safetensors").exists()
    steps = []
    train(on_step=lambda m: steps.append(m["step"]))
    assert 1 < steps[0] <= 9
    assert equal(weights(tmp_path / "out"), uninterrupted)


def test_a_finished_run_is_not_learnt_again(train, tmp_path, uninterrupted):
    _, first = train()
    steps = []
    _, again = train(on_step=lambda m: steps.append(m))
    assert steps == []
    assert replace(again, seconds=0) == replace(first, seconds=0)
    assert equal(weights(tmp_path / "out"), uninterrupted)


# ---- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [({"k": 5}, "k=4.*k=5"), ({"passes": 3}, "passes=2.*passes=3"),
     ({"activations": "token"}, "activations='turn-end'.*activations='token'")],
)  # fmt: skip
@pytest.mark.parametrize("killed_before_the_first_checkpoint", [True, False])
def test_another_config_is_refused(train, change, says, killed_before_the_first_checkpoint):
    call = 1 if killed_before_the_first_checkpoint else 9
    with pytest.raises(Killed):
        train(on_step=raise_at(call))
    with pytest.raises(InputError, match=says):
        train(config=replace(CONFIG, **change))
    train()  # the first run goes on


def test_another_backbone_or_corpus_is_refused(train, tmp_path):
    from sarm.backbone import load_backbone

    with pytest.raises(Killed):
        train(on_step=raise_at(9))
    with pytest.raises(InputError, match="corpus="):
        train(texts=TEXTS[1:])
    other = load_backbone(tiny_sarm.save_backbone(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match="backbone="):
        train(backbone=other)


@pytest.mark.parametrize("texts", [[], ["", ""], ["x"]], ids=["none", "blank", "one state"])
def test_an_empty_corpus_is_refused_and_leaves_nothing(train, tmp_path, texts):
    with pytest.raises(InputError, match="fewer than 2 states"):
        train(texts=texts, config=replace(CONFIG, max_states=1000))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "bad",
    [{"passes": 0}, {"batch_size": 0}, {"chunk_states": 1}, {"max_states": 1}, {"lr": -1.0},
     {"lr": float("nan")}, {"clip": 0.0}, {"ema": 1.0}, {"k_start": 3}, {"k_start": 65},
     {"decay": 1.5}, {"warmup": float("nan")}, {"optimizer": "sgd"}, {"dead_latents": "pray"},
     {"pre_bias": "ones"}, {"dead_after": 0}, {"k_aux": 0}, {"aux_weight": float("inf")}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        replace(CONFIG, **bad)


def test_k_above_n_latents_is_refused(train):
    with pytest.raises(InputError, match=r"k must be in \[1, n_latents=64\], got 65"):
        train(config=replace(CONFIG, k=65))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    train, tmp_path, monkeypatch, uninterrupted
):
    real = SaeTrainer._step

    def poisoned(self, x, *rest):
        return real(self, x * float("nan") if self.step == 9 else x, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(SaeTrainer, "_step", poisoned)
        with pytest.raises(
            InputError, match=r"loss is nan at step 9 \(chunk 1, documents \d+ to \d+\)"
        ):
            train()
    assert not (tmp_path / "out" / "sae.safetensors").exists()
    train()
    assert equal(weights(tmp_path / "out"), uninterrupted)


def test_weights_that_are_not_finite_never_reach_a_checkpoint(train, tmp_path, monkeypatch):
    """A bad gradient in a chunk's last step shows up in no loss."""
    real, saved = SaeTrainer._step, []

    def poisoned(self, *batch):
        out = real(self, *batch)
        if self.step == 12:  # the last of chunk 1 (two passes over 3 batches, twice)
            with torch.no_grad():
                self.sae.latent_bias[0] = float("inf")
        return out

    monkeypatch.setattr(SaeTrainer, "_step", poisoned)
    with pytest.raises(InputError, match="step 12"):
        train(on_step=lambda m: saved.append(m["step"]))
    assert saved[-1] == 12


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_disk_full_of_states_stops_and_can_be_resumed(
    train, tmp_path, monkeypatch, uninterrupted, prefetch
):
    """The checkpoint of the chunk before is kept, and so are the finished pieces."""
    real, chunks = stream.replace_file, {}

    @contextlib.contextmanager
    def full(path, *mode):
        pieces = chunks.setdefault(path.parent, [])
        pieces.append(path)
        if len(chunks) == 3 and len(pieces) == 2:
            raise OSError(28, "No space left on device", str(path))
        with real(path, *mode) as file:
            yield file

    with monkeypatch.context() as patch:
        patch.setattr(stream, "replace_file", full)
        with pytest.raises(OSError, match="No space"):
            train(prefetch=prefetch)
    assert (tmp_path / "out/.progress/trainer.safetensors").exists()
    kept = list((tmp_path / "out/.progress/states").rglob("piece-*"))
    assert kept == list(chunks.values())[2][:1]
    train(prefetch=prefetch)
    assert equal(weights(tmp_path / "out"), uninterrupted)


def test_a_full_disk_leaves_the_earlier_sae_and_can_be_resumed(train, tmp_path, monkeypatch):
    train()
    before = weights(tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sarm.checkpoint.save_file", full)
        with pytest.raises(OSError, match="No space"):
            train()
    assert equal(weights(tmp_path / "out"), before)
    assert not list((tmp_path / "out").glob(".saving-*"))


# ---- what is learnt ------------------------------------------------------------------------


def test_the_decoder_has_unit_rows_after_training(train):
    trainer, _ = train()
    assert torch.allclose(trainer.sae.w_dec.norm(dim=1), torch.ones(64), atol=1e-6)


def test_the_loss_falls_on_sparse_data(synthetic):
    config = SaeTrainConfig(n_latents=96, k=3, batch_size=100, passes=30, lr=3e-3)
    trainer, losses = synthetic(config, sparse_states())
    assert sum(losses[-15:]) < 0.35 * sum(losses[:15])
    assert trainer.final["fvu"] < 0.35


def test_constant_dimensions_and_rows_do_no_harm(synthetic):
    states = sparse_states(n=200)
    states[:, 5] = 2.0
    states[7] = 0.0
    trainer, losses = synthetic(SaeTrainConfig(n_latents=64, k=4, batch_size=50), states)
    assert all(loss == loss for loss in losses)
    assert all(torch.isfinite(p).all() for p in trainer.folded().parameters())


def test_fvu_mse_and_dead_latents_against_an_independent_computation(synthetic):
    """With a vanishing learning rate the reported numbers are those of one fixed SAE."""
    config = SaeTrainConfig(n_latents=64, k=4, batch_size=64, lr=1e-30, standardize=False)
    states = sparse_states(n=300) + 5.0
    trainer, _ = synthetic(config, states)
    sae = trainer.sae
    dense = (states - sae.pre_bias).double() @ sae.encoder.weight.double().t() + sae.latent_bias
    top = dense.topk(4, dim=1)
    rebuilt = torch.zeros(300, 64, dtype=torch.float64).scatter(1, top.indices, top.values)
    rebuilt = rebuilt @ sae.decoder.weight.double().t() + sae.pre_bias.double()
    error = (rebuilt - states).square().sum(1)
    fvu = error.sum() / (states - states.mean(0)).square().sum()
    assert trainer.final["fvu"] == pytest.approx(fvu.item(), rel=1e-4)
    mse = (error / states.square().sum(1)).mean()
    assert trainer.final["normalized_mse"] == pytest.approx(mse.item(), rel=1e-4)
    assert trainer.final["dead"] == pytest.approx(1 - len(top.indices.unique()) / 64)


def test_a_tiny_last_chunk_does_not_decide_the_report(train, backbone, tokenizer):
    """131,072 states and then 3 more: FVU over 3 states says nothing."""
    _, whole = train("a", replace(CONFIG, chunk_states=40, max_states=40))
    _, more = train("b", replace(CONFIG, chunk_states=40, max_states=46))
    assert more.states == 46
    assert more.fvu < 3 * whole.fvu


@pytest.mark.parametrize("standardize", [True, False])
def test_folding_is_exact(synthetic, standardize):
    """On raw states the folded SAE has the inner one's latents; reconstructions map back."""
    raw = sparse_states(n=400) * torch.linspace(0.1, 8, 32) + torch.linspace(-3, 3, 32)
    from sarm.sae import normalize_tokens

    states = normalize_tokens(raw)
    config = SaeTrainConfig(
        n_latents=96, k=5, batch_size=50, passes=4, lr=3e-3, standardize=standardize
    )
    trainer, _ = synthetic(config, states)
    folded = trainer.folded()
    assert folded.normalization == "token"
    inner_x = (states - trainer.mean) / trainer.std
    with torch.inference_mode():
        saved = trainer.average.sae
        inner, outer = saved.encode_normalized(inner_x), folded.encode(raw)
        back = saved.decode(inner) * trainer.std + trainer.mean
        # equal up to rounding; a tie at the k-th place may go the other way in a row or two
        agree = (inner.idx.sort(1).values == outer.idx.sort(1).values).all(1)
        assert agree.float().mean() > 0.99
        scale = inner.vals.abs().max()
        assert (inner.vals - outer.vals)[agree].abs().max() < 2e-5 * scale
        assert (folded.decode(outer) - back)[agree].abs().max() < 2e-5 * back.abs().max()


def test_the_saved_sae_is_the_folded_one(train, tmp_path):
    trainer, report = train()
    assert equal(weights(tmp_path / "out"), trainer.folded().state_dict())
    record = json.loads((tmp_path / "out" / "sae.json").read_text())
    assert record["training"]["activations"] == "turn-end"
    assert record["fvu"] == report.fvu
    assert load_sae(tmp_path / "out").normalization == "token"


# ---- schedule ------------------------------------------------------------------------------


def test_the_schedule_warms_up_stays_and_decays():
    schedule = Schedule(CONFIG, total_steps=200, total_examples=3200)
    factors = [schedule.lr(step) / CONFIG.peak_lr for step in range(200)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:160] == [1.0] * 150
    assert factors[160:] == pytest.approx([(200 - i) / 40 for i in range(160, 200)])


def test_k_falls_from_its_start_to_its_end():
    config = replace(CONFIG, k=4, k_start=24, k_anneal=0.5)
    schedule = Schedule(config, total_steps=100, total_examples=1600)
    ks = [schedule.k(step) for step in range(100)]
    assert ks[0] == 24
    assert ks[25] == 14
    assert ks == sorted(ks, reverse=True)
    assert ks[49] > 4
    assert set(ks[50:]) == {4}
    assert {Schedule(CONFIG, 100, 1600).k(step) for step in range(100)} == {4}


@pytest.mark.parametrize(
    ("examples", "given", "expected"),
    [(10**10, None, 10_000_000), (160_000, None, 8_000), (100, None, 64), (10**10, 77, 77)],
)
def test_a_short_run_notices_dead_latents_in_time(examples, given, expected):
    config = replace(CONFIG, dead_after=given)
    assert Schedule(config, examples // 16, examples).dead_after == expected


@pytest.mark.parametrize("max_states", [None, 90, 55])
def test_a_run_takes_exactly_the_steps_its_schedule_is_made_for(train, max_states):
    """No step is taken at learning rate zero, none of the decay is cut off."""
    rates, totals = [], set()

    def on_step(metrics):
        totals.add(metrics["of"])

    trainer, report = train(config=replace(CONFIG, max_states=max_states), on_step=on_step)
    assert totals == {report.steps}
    assert trainer.step == trainer.schedule.total_steps
    rates.append(trainer.optimizer.adam.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(CONFIG.peak_lr / max(1, report.steps // 5))
    if max_states:
        assert report.states == max_states


def test_making_a_trainer_leaves_the_global_random_state_alone(backbone, tokenizer, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    SaeTrainer(backbone, tokenizer, CONFIG, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_the_shuffle_is_pinned():
    """The same in every process and Python version: a resumed run may be another process."""
    orders = {tuple(shuffle(6, 1, c, e).tolist()) for c in (0, 1) for e in (0, 1)}
    assert len(orders) == 4
    assert shuffle(6, 1, 0, 0).tolist() == [4, 3, 0, 5, 2, 1]


def test_origin_names_another_layer_or_backbone(train, backbone, backbone_dir, tmp_path):
    train()
    check_origin(tmp_path / "out", backbone)
    with pytest.raises(
        InputError, match=r"trained on a backbone with layer 2, this one has layer 3"
    ):
        check_origin(tmp_path / "out", load_backbone(backbone_dir, 3))
    with torch.no_grad():
        backbone.embed_tokens.weight.mul_(1.01)
    with pytest.raises(InputError, match="trained on a backbone with fingerprint"):
        check_origin(tmp_path / "out", backbone)
    check_origin(tmp_path / "out", load_backbone(backbone_dir, dtype=torch.bfloat16))


def test_an_sae_that_does_not_say_its_origin_passes(backbone, tmp_path):
    check_origin(tmp_path, backbone)
    check_origin(tmp_path / "published_K4.pt", backbone)


# ---- everything at once --------------------------------------------------------------------

RICH = {
    "auxk, 8 bits": {
        "dead_latents": "auxk", "optimizer": "adam-8bit", "n_latents": 160, "k_start": 12,
        "multi_topk": True, "dead_after": 20, "ema": 0.9, "pre_bias": "median",
        "activations": "token:1,turn-end:2,last:1",
    },
    "resampling, bf16": {
        "dead_latents": "resample", "optimizer": "adam-bf16", "dead_after": 16, "ema": 0.99,
        "clip": 0.1, "passes": 4,
    },
    "plain": {"dead_latents": "none", "ema": 0.0, "clip": None, "standardize": False},
}  # fmt: skip


def conversations():
    return ((pair["id"], pair["prompt"] + pair["chosen"]) for pair in tiny_sarm.make_pairs(12))


@pytest.mark.parametrize("name", RICH)
def test_a_killed_run_with_every_option_resumes_to_the_same_bits(
    backbone, tokenizer, tmp_path, name
):
    config = replace(CONFIG, **RICH[name])

    def run(folder, **callbacks):
        trainer = SaeTrainer(backbone, tokenizer, config, tmp_path / folder, log_every=1)
        return trainer, trainer.run(lambda: iter(TEXTS), conversations, **callbacks)

    def logged(folder):
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").open()]
        clock = {"tokens_per_second", "eta_seconds"}
        return [{n: v for n, v in row.items() if n not in clock} for row in rows]

    _, whole = run("whole")
    for call in (3, 8, 9):
        with pytest.raises(Killed):
            run("out", on_step=raise_at(call))
    trainer, report = run("out")
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert replace(report, seconds=0) == replace(whole, seconds=0)
    assert [row["step"] for row in logged("out")] == list(range(1, report.steps + 1))
    assert report.alive_scored is not None
    assert any("fvu/scored" in row for row in logged("whole"))
    if config.dead_latents == "resample":
        assert max(row.get("resampled", 0) for row in logged("whole")) > 0
    elif config.dead_latents == "auxk":  # it had latents to teach
        assert any(row["dead"] > 0 for row in logged("whole"))


def test_metrics_have_trainers_names_and_the_right_values(train, tmp_path):
    trainer, report = train()
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert rows[-1]["step"] == report.steps
    names = {"loss", "learning_rate", "grad_norm", "epoch", "num_input_tokens_seen", "k",
             "fvu", "fvu/turn-end", "l0", "dead", "tokens_per_second", "eta_seconds"}  # fmt: skip
    assert names <= set(rows[-1])
    assert rows[-1]["epoch"] == 1.0
    assert rows[-1]["eta_seconds"] == 0
    assert rows[-1]["num_input_tokens_seen"] == report.tokens
    assert rows[-1]["l0"] == CONFIG.k
    assert "alive_scored" not in rows[-1]


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(train, monkeypatch):
    trainers = []
    real = SaeTrainer._loss

    def poisoned(self, x, k, *of):
        loss, *rest = real(self, x, k, *of)
        if self.step == 2:  # finite, its gradient is not
            trainers.append(self)
            loss = loss + 0.0 * (self.sae.latent_bias.abs() * 0).sqrt().sum()
        return loss, *rest

    monkeypatch.setattr(SaeTrainer, "_loss", poisoned)
    with pytest.raises(InputError, match=r"gradient's norm is nan at step 2 \(chunk 0, documents"):
        train()
    assert all(torch.isfinite(p).all() for p in trainers[0].sae.parameters())


def test_the_pre_bias_starts_at_the_data(synthetic):
    states = sparse_states(n=200) + 5.0
    states[:20] += 100.0
    from sarm.training.sae.metrics import geometric_median

    for kind, expected in (
        ("mean", states.mean(0)),
        ("median", geometric_median(states)),
        ("zero", torch.zeros(32)),
    ):
        config = SaeTrainConfig(
            n_latents=64, k=4, batch_size=200, lr=1e-30, standardize=False, pre_bias=kind
        )
        trainer, _ = synthetic(config, states, kind)
        torch.testing.assert_close(trainer.sae.pre_bias.detach(), expected)
