"""The commands of examples/distributed, as written, and a process that dies."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_sarm

from sarm.checkpoint import load_sae
from sarm.scorer import SARMScorer

ROOT = Path(__file__).parents[2]
README = ROOT / "examples" / "distributed" / "README.md"
COMMANDS = re.findall(r"```bash\n(.*?)\n```", README.read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def environment(backbone_dir, tmp_path_factory):
    """The variables that the README sets, and one folder for all commands."""
    folder = tmp_path_factory.mktemp("launched")
    tiny_sarm.write_jsonl(folder / "text.jsonl", [{"text": t} for t in tiny_sarm.make_texts(30)])
    tiny_sarm.write_jsonl(folder / "pairs.jsonl", tiny_sarm.make_pairs(30))
    return os.environ | {
        "BACKBONE": str(backbone_dir),
        "TEXT": str(folder / "text.jsonl"),
        "PREFERENCES": str(folder / "pairs.jsonl"),
        "OUT": str(folder),
        "HEAD": "localhost",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }


def shell(command, environment):
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def command_for(name):
    (found,) = [c for c in COMMANDS if f"$OUT/{name} " in f"{c} " and f"-o $OUT/{name}" in c]
    return found


def test_a_torchrun_command_as_written(environment):
    printed = shell(command_for("sae"), environment)
    assert len([line for line in printed.splitlines() if "states from" in line]) == 1  # rank 0's
    assert load_sae(Path(environment["OUT"]) / "sae").n_latents == 512


@pytest.mark.slow
def test_all_other_commands_as_written(environment):
    out = Path(environment["OUT"])
    if not (out / "sae").exists():
        shell(command_for("sae"), environment)
    for name in ("sharded", "head", "ddp", "fsdp", "torchrun"):
        shell(command_for(name), environment)
    nodes = command_for("nodes")
    shell(f"NODE=1 bash -c '{nodes}' & NODE=0 bash -c '{nodes}'; wait $!", environment)
    assert load_sae(out / "nodes").n_latents == load_sae(out / "sharded").n_latents == 512
    chat = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "rain"}]
    for name in ("head", "ddp", "fsdp", "torchrun"):
        assert SARMScorer.from_pretrained(out / name).score([chat]).isfinite().all()
    logs = [
        json.loads((out / n / "training.json").read_text())["log"] for n in ("fsdp", "torchrun")
    ]
    assert [e.get("loss") for e in logs[0]] == pytest.approx([e.get("loss") for e in logs[1]])


@pytest.mark.slow
def test_a_process_that_dies_stops_the_job_and_the_run_goes_on(environment):
    """Killed in the middle; resumed in one process."""
    out = Path(environment["OUT"]) / "dies"
    command = [
        "torchrun", "--nproc-per-node", "2", "-m", "sarm", "train-sae", environment["BACKBONE"],
        environment["TEXT"], "-o", str(out), "--activations", "turn-end", "--chunk-states", "20",
        "--batch-size", "4", "--passes", "4", "--log-every", "1", "--shards", "2",
    ]  # fmt: skip
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.PIPE,
    )
    metrics = out / "metrics.jsonl"
    while job.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) > 25:
            workers = subprocess.run(
                ["pgrep", "-P", str(job.pid)], capture_output=True, text=True
            ).stdout.split()
            os.kill(int(workers[-1]), signal.SIGKILL)
            break
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 1
    assert "Signal 9 (SIGKILL)" in errors
    assert not (out / "sae.safetensors").exists()
    shell(" ".join(["python", *command[3:-2]]), environment)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 26
    assert load_sae(out).n_latents == 512
