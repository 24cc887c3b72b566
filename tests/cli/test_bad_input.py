"""Bad input: one line on stderr, exit code 2, nothing half-written."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import tiny_sarm
from safetensors.torch import load_file, save_file

TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def model_copy(trained, tmp_path):
    return shutil.copytree(trained / "rm", tmp_path / "model")


@pytest.fixture
def score_model(refused, files, tmp_path):
    """Score with a broken model: the refusal's line; no output may be there."""

    def run(model):
        line = refused("score", files / "in.jsonl", "-m", model, "-o", tmp_path / "out.jsonl")
        assert not list(tmp_path.glob("out.jsonl*"))
        return line

    return run


# ---- checkpoints ---------------------------------------------------------------------------


def test_a_missing_checkpoint(score_model, tmp_path):
    assert "no such checkpoint directory" in score_model(tmp_path / "nowhere")


@pytest.mark.parametrize("size", [0, 5, 3000])
def test_a_half_downloaded_checkpoint(score_model, model_copy, size):
    with open(model_copy / "model.safetensors", "rb+") as file:
        file.truncate(size)
    assert str(model_copy) in score_model(model_copy)


def test_a_config_that_is_no_json(score_model, model_copy):
    (model_copy / "config.json").write_text('{"sarm": ')
    assert str(model_copy) in score_model(model_copy)


def test_a_checkpoint_that_is_no_sarm(score_model, backbone_dir):
    assert "not a SARM checkpoint" in score_model(backbone_dir)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("score.weight", lambda t: t[:, :-1].contiguous(), "score.weight has shape"),
        ("sae.pre_bias", lambda t: t * float("nan"), "sae.pre_bias holds NaN"),
        ("sae.latent_bias", None, "missing tensor sae.latent_bias"),
    ],
)
def test_wrong_nan_and_missing_tensors(score_model, model_copy, name, change, says):
    tensors = load_file(model_copy / "model.safetensors")
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)
    save_file(tensors, model_copy / "model.safetensors", {"format": "pt"})
    assert says in score_model(model_copy)


def test_a_config_with_k_above_n_latents(score_model, model_copy):
    config = json.loads((model_copy / "config.json").read_text())
    config["sarm"]["k"] = 65
    (model_copy / "config.json").write_text(json.dumps(config))
    assert "k must be in [1, n_latents=64], got 65" in score_model(model_copy)


# ---- training ------------------------------------------------------------------------------


@pytest.fixture
def train_sae(refused, backbone_dir, files, tmp_path):
    def run(*options, backbone=backbone_dir, text=files / "text.jsonl"):
        line = refused("train-sae", backbone, text, "-o", tmp_path / "sae", *options)
        assert not (tmp_path / "sae").exists()
        return line

    return run


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--n-latents", 64, "--k", 65], "k must be in [1, n_latents=64], got 65"),
        (["--n-latents", 0], "n_latents=0"),
        (["--k", 0], "got 0"),
        (["--layer", 5], 'layer must be "middle" or in [1, 4]'),
        (["--layer", "last"], 'layer must be "middle" or in [1, 4]'),
        (["--activations", "word"], "activations must be one of token, sentence, turn-end"),
        (["--context", 5], "context must be at least 20 tokens"),
        (["--batch-size", 0], "batch_size must be at least 1"),
        (["--max-states", 0], "max_states must be at least 2"),
        (["--lr", -1], "lr must be positive"),
        (["--dtype", "int3"], "--dtype must be one of"),
        (["--threads", 0], "--threads must be at least 1"),
    ],
)
def test_train_sae_options_out_of_range(train_sae, options, says):
    assert says in train_sae(*options)


def test_train_sae_on_an_unknown_architecture(train_sae, tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert "unknown backbone architecture 'gpt2'" in train_sae(backbone=folder)


def test_train_sae_on_missing_and_malformed_text(train_sae, tmp_path):
    assert "no such file" in train_sae(text=tmp_path / "none.jsonl")
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    assert f"{path}:2: malformed JSON" in train_sae(text=path)
    path.write_text('{"body": "fine"}\n')
    assert f"{path}:1: expected a string field 'text'" in train_sae(text=path)
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xe9t\xe9"}\n')  # Latin-1
    assert f"{path}:2: malformed JSON ('utf-8' codec can't decode byte 0xe9" in train_sae(text=path)
    for tiny in ("", '{"text": ""}\n', '{"text": "x"}\n'):
        path.write_text(tiny)
        assert "fewer than 2 states" in train_sae(text=path)


def test_train_sae_on_conversations_that_cannot_be_read(
    train_sae, sarm, backbone_dir, files, tmp_path
):
    path = tmp_path / "turns.jsonl"
    options = ["--n-latents", 64, "--k", 4, "--conversations", path]
    assert "no such file" in train_sae(*options)
    path.write_text('{"text": "hello"}\n')
    assert f"{path}:1: expected `messages`" in train_sae(*options)
    good = {"prompt": "the cat", "completion": "sat"}
    robot = {"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path.write_text("\n".join(map(json.dumps, [good, robot, good])))
    assert f"{path}:2: the chat template refuses it" in train_sae(*options)
    path.write_text(path.read_text() + '\n{"chosen": "a"}\n')
    done = sarm("train-sae", backbone_dir, files / "text.jsonl", "-o", tmp_path / "sae",
                *options, "--skip-bad")  # fmt: skip
    assert done.code == 0, done.err
    assert "skipped 2 malformed rows" in done.err


def test_train_sae_skips_and_counts_bad_rows_when_asked(sarm, backbone_dir, tmp_path):
    path = tmp_path / "bad.jsonl"
    rows = [json.dumps({"text": t}) for t in tiny_sarm.make_texts(20)]
    path.write_text("\n".join([*rows[:7], "{", *rows[7:], '{"x": 1}']) + "\n")
    done = sarm("train-sae", backbone_dir, path, "-o", tmp_path / "sae", "--n-latents", 32,
                "--k", 2, "--skip-bad")  # fmt: skip
    assert done.code == 0
    assert f"skipped 2 malformed rows, the first: {path}:8" in done.err.replace("\n", "")


@pytest.fixture
def train_rm(refused, backbone_dir, trained, files, tmp_path):
    def run(*options, sae=trained / "sae", preferences=files / "train.jsonl", cache=True):
        line = refused("train-rm", backbone_dir, sae, preferences, "-o", tmp_path / "rm",
                       "--cache", tmp_path / "cache.sqlite", *options)  # fmt: skip
        assert not (tmp_path / "rm").exists()
        return line

    return run


def test_train_rm_refusals(train_rm, tmp_path, files):
    assert "no such SAE" in train_rm(sae=tmp_path / "none")
    assert "no such file" in train_rm(preferences=tmp_path / "none.jsonl")
    assert "l2 must be positive" in train_rm("--l2", 0)
    path = tmp_path / "bad.jsonl"
    path.write_text((files / "train.jsonl").read_text() + '{"chosen": [], "rejected": []}\n')
    assert f"{path}:61: empty conversation" in train_rm(preferences=path)
    path.write_text("")
    assert "no preference pairs" in train_rm(preferences=path)
    tiny_sarm.write_jsonl(path, [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 3)
    assert "no pair whose chosen and rejected differ" in train_rm(preferences=path)


def test_train_rm_refuses_a_pickle(train_rm, tmp_path):
    import torch

    path = tmp_path / "sae_K4_.pt"
    torch.save({"w": os.system}, path)
    assert "refused, it is corrupt or holds more than plain tensors" in train_rm(sae=path)


def test_train_rm_skips_and_counts_pairs_the_template_refuses(
    sarm, backbone_dir, trained, files, tmp_path
):
    row = tiny_sarm.make_pairs(1)[0]
    bad = {**row, "prompt": [{"role": "alien", "content": "x"}]}
    lines = (files / "train.jsonl").read_text().splitlines()[:20]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([json.dumps(bad), "{", *lines]) + "\n")
    done = sarm("train-rm", backbone_dir, trained / "sae", path, "-o", tmp_path / "rm",
                "--skip-bad", "--l2", 0.1)  # fmt: skip
    assert done.code == 0
    assert "20 pairs" in done.out
    assert "skipped 2 malformed rows" in done.err


# ---- scoring -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "malformed JSON"),
        ("[1]", "expected an object"),
        ('{"messages": []}', "empty conversation"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "last message must be the assistant"),
        ('{"messages": [{"role": "alien", "content": "a"}, {"role": "assistant", "content": "b"}]}',
         "chat template refuses it"),
        ('{"messages": [{"role": "assistant", "content": 3}]}', "must be strings"),
        ('{"messages": ["hi"]}', "expected {'role', 'content'}"),
        ('{"prompt": "a"}', "expected `messages`, or `prompt` with"),
        ('{"prompt": 3, "completion": "b"}', "must be strings or message lists"),
        ('{"messages": "hi"}', "expected `messages`"),
    ],
)  # fmt: skip
def test_malformed_rows(refused, sarm, trained, tmp_path, line, says):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(TALK) + "\n\n" + line + "\n" + json.dumps(TALK) + "\n")
    ask = ["score", source, "-m", trained / "rm", "-o", tmp_path / "out.jsonl"]
    error = refused(*ask)
    assert f"{source}:3" in error
    assert says in error
    assert not list(tmp_path.glob("out.jsonl*"))  # no row was done: nothing to resume
    done = sarm(*ask, "--skip-bad")
    assert done.code == 0
    assert "skipped 1 malformed rows" in done.err
    rows = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [0, 2]  # the bad one keeps its number


def test_missing_input_leaves_nothing(refused, trained, tmp_path):
    line = refused("score", tmp_path / "no.jsonl", "-m", trained / "rm", "-o", tmp_path / "o.jsonl")
    assert "no.jsonl: no such file" in line
    assert list(tmp_path.iterdir()) == []


def test_explain_refusals(refused, trained, files):
    ask = ["explain", "-m", trained / "rm"]
    assert "pass a file, or --prompt and --response" in refused(*ask, "--prompt", "x")
    assert "has no row 40" in refused(*ask, files / "in.jsonl", "--row", 40)


@pytest.mark.parametrize(
    ("feature", "says"),
    [("5", "INDEX=FACTOR"), ("x=1", "INDEX=FACTOR"), ("64=1", "feature must be in [0, 64)"),
     ("-1=1", "feature must be in [0, 64)"), ("5=nan", "finite")],
)  # fmt: skip
def test_steer_refusals(refused, trained, tmp_path, feature, says):
    line = refused("steer", "-m", trained / "rm", "-o", tmp_path / "s", f"--feature={feature}")
    assert says in line
    assert not (tmp_path / "s").exists()


def test_eval_refusals(refused, trained, files, tmp_path):
    ask = ["eval", "-m", trained / "rm"]
    assert "nothing to do" in refused(*ask)
    assert "no such file" in refused(*ask, "--preferences", tmp_path / "none.jsonl")
    turn = [{"role": "assistant"}]
    path = tiny_sarm.write_jsonl(tmp_path / "p.jsonl", [{"chosen": turn, "rejected": turn}])
    assert f"{path}:1" in refused(*ask, "--preferences", path)
    (tmp_path / "cache.sqlite").write_text("not a database, " * 100)
    line = refused(
        *ask, "--preferences", files / "valid.jsonl", "--cache", tmp_path / "cache.sqlite"
    )
    assert "not a state cache" in line
    twice = refused(*ask, "-m", trained / "rm", "--preferences", files / "valid.jsonl")
    assert "is given twice" in twice
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("preferences", "reward-bench-2", "rm-bench", "judge-bench", "rmb"):
        assert "empty.jsonl: no items" in refused(*ask, f"--{name}", tmp_path / "empty.jsonl")
    path = tiny_sarm.write_jsonl(tmp_path / "rb2.jsonl", [{"subset": "Ties", "prompt": "q"}])
    line = refused(*ask, "--reward-bench-2", path, "--out", tmp_path / "out")
    assert line == f"sarm: {path}:1: field 'chosen' is missing, got subset, prompt"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "--row", "-1"],
        ["explain", "--top", "-1"],
        ["score", "--block", "0"],
        ["nothing"],
    ],
)
def test_usage_errors_exit_with_2(sarm, arguments):
    done = sarm(*arguments)
    assert done.code == 2
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback(sarm, monkeypatch, tmp_path):
    monkeypatch.setenv("SARM_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        sarm("score", "in.jsonl", "-m", tmp_path / "none", "-o", tmp_path / "o.jsonl")


# ---- a full disk ---------------------------------------------------------------------------


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


FULL = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = ["sarm", *sys.argv[2:]]
runpy.run_module("sarm", run_name="__main__")
"""


def test_a_disk_full_while_saving_in_a_process_of_its_own(trained, tmp_path):
    """Files may not grow beyond 20 kB: the kernel refuses the write, as on a full disk."""
    model = shutil.copytree(trained / "rm", tmp_path / "model")
    before = snapshot(model)
    command = [sys.executable, "-c", FULL, "20000", "steer", "-m", str(trained / "rm"), "-o",
               str(model), "-f", "1=2"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "File too large" in done.stderr
    assert snapshot(model) == before


@pytest.fixture
def small_files():
    """Files of this process may not grow beyond 20 kB."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_full_while_training(sarm, trained, backbone_dir, files, tmp_path, small_files):
    done = sarm("train-sae", backbone_dir, files / "text.jsonl", "-o", tmp_path / "sae",
                "--n-latents", 256, "--k", 4)  # fmt: skip
    assert done.code == 2, done.err
    assert "File too large" in done.err
    assert not (tmp_path / "sae" / "sae.safetensors").exists()
    assert not list((tmp_path / "sae").rglob("trainer.safetensors"))


def test_a_full_state_cache(sarm, trained, backbone_dir, files, tmp_path, small_files):
    done = sarm("train-rm", backbone_dir, trained / "sae", files / "train.jsonl", "-o",
                tmp_path / "rm")  # fmt: skip
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert not list((tmp_path / "rm").glob("*.safetensors"))


def test_a_disk_full_while_scoring_loses_no_row(sarm, trained, files, tmp_path, monkeypatch):
    out, calls = tmp_path / "out.jsonl", [0]
    ask = ["score", files / "in.jsonl", "-m", trained / "rm", "-o", out, "--block", 8]
    real = os.fsync

    def full(handle):
        calls[0] += 1
        if calls[0] == 4:  # the note, and two blocks, are through
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = sarm(*ask)
    assert (done.code, done.err) == (2, "sarm: No space left on device\n")
    assert not out.exists()
    done = sarm(*ask)
    assert done.code == 0
    assert [json.loads(r)["row"] for r in out.read_text().splitlines()] == list(range(40))
