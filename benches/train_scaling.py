"""Suite `train-scaling`: tokens/s of SAE training over the number of processes.

The whole pipeline, as `sarm train-sae` runs it: tokens through the backbone, an exchange of states,
SAE steps. Strong scaling: the same corpus and batches for every number of processes, each with one
thread (on a GPU machine: one GPU), "data" parallel or with the "latents" spread over all of them.
SmolLM2-135M-Instruct cut at 15 layers, n_latents 9,216, k 27, states at the ends of the sentences
of the passages that `sarm demo` learns from. Time is the trainer's own: survey and loading are not
in it. Processes are started anew for every run, in turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import charts
import torch
from measure import quantile, ratio
from suite import BenchError, Options, Row
from workload import LAYERS, N_LATENTS, K

CASE = "train-sae, processes"
WAYS = {"data": 1, "latents": 0}  # shards; 0: as many as processes
STATES, BATCH = 1024, 512
WORLDS = (2, 4, 8)
ALONE = "1 process"


def run(options: Options) -> list[Row]:
    """A row for each number of processes and way; ratios are to one process."""
    most = torch.cuda.device_count() if options.device == "cuda" else os.cpu_count() or 1
    points = {ALONE: (1, 1)}  # name -> (processes, shards)
    for world in WORLDS:
        if world <= most:
            for way, shards in WAYS.items():
                points[f"{world} processes, {way}"] = world, shards or world
    points = {name: point for name, point in points.items() if options.wants(CASE, name)}
    if not any(world > 1 for world, _ in points.values()):
        raise BenchError(f"train-scaling needs two processes; --only or {most} cores leave none")
    times: dict[str, list[float]] = {name: [] for name in points}
    tokens = 0
    for _ in range(options.runs):
        for name, (world, shards) in points.items():
            options.log(f"{CASE}  {name}")
            seconds, tokens = launch(world, shards, options.device)
            times[name].append(1e3 * seconds)
    shape = f"{STATES} states, {tokens} tokens, batches of {BATCH}"
    return [row_of(name, shape, times, tokens) for name in points]


def row_of(name: str, shape: str, times: dict[str, list[float]], tokens: int) -> Row:
    """Median, spread and ratio to one process."""
    median, alone = quantile(times[name], 0.5), times.get(ALONE)
    speed = 1e3 * tokens / median
    row = Row(
        CASE,
        shape,
        "fp32",
        name,
        ms=median,
        p20_ms=quantile(times[name], 0.2),
        p80_ms=quantile(times[name], 0.8),
        accuracy={"tokens_per_s": speed},
        note=f"{speed:,.0f} tokens/s",
    )
    if alone and name != ALONE:
        row.ratios[ALONE] = ratio(times[name], alone)
        row.note += f", {1 / row.ratios[ALONE].value:.2f}x {ALONE}"
    return row


def launch(world: int, shards: int, device: str) -> tuple[float, int]:
    """(seconds, tokens) of a training run in `world` processes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(world), __file__, str(shards), folder, str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{world} processes: {done.stderr[-2000:]}")
        report = json.loads(file.read_text("utf-8"))
    return report["seconds"], report["tokens"]


def worker(shards: int, folder: str, file: str) -> None:
    """What a process does."""
    from sarm import load_backbone
    from sarm.backbone import load_tokenizer
    from sarm.demo.corpus import local_passages
    from sarm.demo.fetch import smollm2
    from sarm.training.distributed.world import World, own_device
    from sarm.training.sae import SaeTrainConfig, SaeTrainer

    torch.set_num_threads(1)
    device, path = own_device(), smollm2()
    config = SaeTrainConfig(
        N_LATENTS, K, max_states=STATES, chunk_states=STATES, batch_size=BATCH, passes=4, ema=0
    )
    backbone = load_backbone(path, LAYERS, device=device, dtype=torch.float32)
    texts = local_passages()[:400]
    with World.joined(shards) as world:
        trainer = SaeTrainer(backbone, load_tokenizer(path), config, Path(folder), world=world)
        report = trainer.run(lambda: iter(texts))
        if world.main:
            found = {"seconds": report.seconds, "tokens": report.tokens}
            Path(file).write_text(json.dumps(found), "utf-8")


def plot(rows: list[Row], path: Path) -> None:
    """Tokens a second over processes, with the line of perfect scaling."""
    figure, (axis,) = charts.grid(1, 4.5)
    speed = {row.name: row.accuracy["tokens_per_s"] for row in rows}
    alone = speed.pop(ALONE, None)
    worlds = sorted({1} | {int(name.split()[0]) for name in speed})
    for way in WAYS:
        points = [(1, alone)] if alone is not None else []
        points += [(int(name.split()[0]), y) for name, y in speed.items() if name.endswith(way)]
        axis.plot(*zip(*points, strict=True), marker="o", label=f"{way} parallel")
    if alone is not None:
        axis.plot(worlds, [alone * w for w in worlds], color="grey", linestyle=":", label="perfect")
    axis.set_xticks(worlds)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("processes")
    axis.set_ylabel("tokens/s")
    axis.legend()
    figure.savefig(path)


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2], sys.argv[3])
