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

CASES = {"data": 1, "latents": 0}  # shards; 0: as many as processes
STATES, BATCH = 1024, 512
WORLDS = (1, 2, 4, 8)


def run(options: Options) -> list[Row]:
    """A row for each way and number of processes; ratios are to one process."""
    most = torch.cuda.device_count() if options.device == "cuda" else os.cpu_count() or 1
    worlds = [world for world in WORLDS if world <= most]
    points = [
        (case, world)
        for case in CASES
        for world in worlds
        if options.wants(f"train-sae, {case}", str(world)) and (world > 1 or case == "data")
    ]
    if not any(world > 1 for _, world in points):
        raise BenchError(f"train-scaling needs two processes; --only or {most} cores leave none")
    times: dict[tuple[str, int], list[float]] = {point: [] for point in points}
    tokens = 0
    for _ in range(options.runs):
        for case, world in points:
            options.log(f"train-sae, {case}, {world} processes")
            seconds, tokens = launch(world, CASES[case] or world, options.device)
            times[case, world].append(1e3 * seconds)
    title = f"{STATES} states, {tokens} tokens, batches of {BATCH}"
    return [row_of(case, world, title, times, tokens) for case, world in points]


def row_of(case: str, world: int, title: str, times: dict, tokens: int) -> Row:
    """Median, spread and ratio to one process."""
    mine = times[case, world]
    median = quantile(mine, 0.5)
    alone = times.get(("data", 1))
    return Row(
        case=f"train-sae, {case}",
        shape=title,
        dtype="fp32",
        name=str(world),
        ms=median,
        p20_ms=quantile(mine, 0.2),
        p80_ms=quantile(mine, 0.8),
        ratios={"1": ratio(mine, alone)} if alone and world > 1 else {},
        note=f"{1e3 * tokens / median:,.0f} tokens/s",
    )


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
    speed = {(row.case, int(row.name)): float(row.note.split()[0].replace(",", "")) for row in rows}
    alone = next((value for (_, world), value in speed.items() if world == 1), None)
    for case in dict.fromkeys(row.case for row in rows):
        points = [(world, value) for (name, world), value in speed.items() if name == case]
        if alone is not None and points[0][0] > 1:
            points.insert(0, (1, alone))
        axis.plot(*zip(*points, strict=True), marker="o", label=case)
    worlds = sorted({world for _, world in speed})
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
