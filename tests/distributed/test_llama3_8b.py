"""The published setting's scripts: every option is one of the command line's; the estimate runs."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from sarm.cli import app
from sarm.training.sae import SaeTrainConfig
from sarm.training.trainer import PairTrainConfig

FOLDER = Path(__file__).parents[2] / "examples" / "llama3_8b"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sh"))


def options_of(script):
    """(command, its options as the command line parses them)."""
    environment = {"PATH": os.environ["PATH"], "RUN": "echo", "TEXT": "corpus"}
    done = subprocess.run(
        ["bash", FOLDER / script], env=environment, capture_output=True, text=True, check=True
    )
    name, *arguments = shlex.split(done.stdout)
    command = typer.main.get_command(app).commands[name]
    return name, command.make_context(name, arguments).params


def test_there_are_four():
    assert SCRIPTS == ["rm_1gpu.sh", "rm_8gpu.sh", "sae_1gpu.sh", "sae_8gpu.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_the_published_setting(script):
    name, options = options_of(script)
    assert options["layer"] == "16"
    if name == "train-sae":
        assert (options["n_latents"], options["k"], options["lr"]) == (65536, 192, 5e-4)
        fields = {f: options[f] for f in ("n_latents", "k", "lr", "batch_size", "chunk_states")}
        config = SaeTrainConfig(**fields)
        assert (config.warmup, config.decay) == (0.05, 0.2)
        assert config.n_latents % options["shards"] == 0
    else:
        assert (options["max_length"], options["weight_decay"], options["epochs"]) == (
            4096,
            1e-3,
            3,
        )
        config = PairTrainConfig(
            int(options["mode"]), batch_size=options["batch_size"], lr=options["lr"],
            micro_batch=options["micro_batch"], lora=options["lora"],
        )  # fmt: skip
        processes = 8 if "8gpu" in script else 1
        assert config.batch_size == 512
        assert config.batch_size % (config.micro_batch * processes) == 0
        assert config.warmup == 0.03


@pytest.fixture
def estimate(monkeypatch):
    spec = importlib.util.spec_from_file_location("llama3_8b_estimate", FOLDER / "estimate.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_estimate(estimate):
    assert estimate.table([]) in (FOLDER / "README.md").read_text("utf-8")


def test_the_estimate_says_what_it_is_and_scales(estimate):
    table = estimate.table([])
    assert table.startswith("Estimates, not measurements")
    hours = [float(h) for h in re.findall(r"\| \*\*([\d.]+)\*\*", table)[::2]]
    assert len(hours) == 4
    assert hours[1] < hours[0] / 4  # eight GPUs
    slower = estimate.table(["--mfu", "0.2"])
    assert float(re.findall(r"\| \*\*([\d.]+)\*\*", slower)[0]) > 1.5 * hours[0]
    # 16 decoder layers of 218 M weights, and the SAE's two matrices
    assert estimate.BACKBONE == 16 * 218_103_808
    assert estimate.SAE == 536_870_912
