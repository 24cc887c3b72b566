"""Hours and memory of the commands in this folder, by arithmetic: estimates, nothing was timed.

FLOPs and bytes are counted (benches/roofline.py for the SAE), peaks are NVIDIA's for one H100 SXM,
and each part is said to reach a stated share of its floor. Change the shares to what you measure.

    python examples/llama3_8b/estimate.py [--mfu 0.4] [--sae-share 0.5] [--pair-tokens 1000]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))

import roofline
from suite import Shape

GIB = 2**30
GPU = next(gpu for gpu in roofline.GPUS if gpu.name == "H100 SXM")
LINK = 300e9  # bytes/s in one direction of NVLink that collectives are said to reach (peak 450e9)

# Llama-3.1-8B cut at 16
D, FFN, LAYERS, VOCAB, KV = 4096, 14336, 16, 128256, 1024
LAYER = 2 * D * D + 2 * D * KV + 3 * D * FFN
BACKBONE, EMBEDDING = LAYERS * LAYER, VOCAB * D
# the SAE and its training
LATENTS, K, BATCH = 65536, 192, 4096
SAE = 2 * LATENTS * D
STATES, TOKENS, CONTEXT = 50_000_000, 1_000_000_000, 1024
# the reward model's training
PAIRS, EPOCHS, MAX_LENGTH, RANK = 77_000, 3, 4096, 64
MICRO = {1: 2, 8: 8}  # pairs at once, by GPUs


@dataclass
class Line:
    """A row of the table: hours by part, GiB a GPU by part."""

    what: str
    gpus: int
    hours: dict[str, float]
    gib: dict[str, float]

    def __str__(self) -> str:
        def listed(parts: dict[str, float]) -> str:
            return " + ".join(f"{name} {value:.2g}" for name, value in parts.items())

        hours, gib = sum(self.hours.values()), sum(self.gib.values())
        return (
            f"| {self.what} | {self.gpus} | **{hours:.1f}** ({listed(self.hours)}) "
            f"| **{gib:.0f}** ({listed(self.gib)}) |"
        )


def forward_flops(tokens: float, context: int) -> float:
    """Of the cut backbone: products with the weights, and causal attention."""
    return tokens * (2 * BACKBONE + LAYERS * 4 * D * context / 2)


def sae(gpus: int, arguments: argparse.Namespace) -> Line:
    """sae_1gpu.sh and, with shards, sae_8gpu.sh."""
    extraction = forward_flops(TOKENS, CONTEXT) / (arguments.mfu * 1e12 * GPU.bf16) / gpus
    steps = STATES / BATCH
    shape = Shape(BATCH, D, LATENTS // gpus, max(1, K // gpus))
    step = roofline.floor_ms("sae_step", shape, "fp32", GPU) / 1e3 / arguments.sae_share
    # Adam reads and writes weight, gradient and moments (28 bytes); clipping and projection 12 more
    step += 40 * SAE / gpus / (1e12 * GPU.hbm) / arguments.sae_share
    if gpus > 1:
        step += 4 * BATCH * (K * gpus + 2 * D) / LINK
    hours = {"backbone": extraction / 3600, "SAE": steps * step / 3600}
    states = 3 * BATCH * D * 4 + BATCH * K * 12
    gib = {
        "backbone bf16": 2 * (BACKBONE + EMBEDDING) / GIB,
        "SAE with Adam and EMA": 20 * SAE / gpus / GIB,
        "batch": states / GIB,
        "backbone's activations": 65536 * (4 * D + 2 * FFN) * 2 / GIB,
    }
    return Line("SAE", gpus, hours, gib)


def reward(gpus: int, arguments: argparse.Namespace) -> Line:
    """rm_1gpu.sh (LoRA) and rm_8gpu.sh (FSDP2)."""
    tokens = EPOCHS * PAIRS * arguments.pair_tokens
    full = gpus > 1
    # forward, forward again (checkpointing), gradient of the inputs, gradient of the weights
    flops = forward_flops(tokens, arguments.pair_tokens // 2) * (4 if full else 3)
    sae_flops = EPOCHS * PAIRS * arguments.turn_tokens * 2 * LATENTS * D
    hours = {"backbone": flops / (arguments.mfu * 1e12 * GPU.bf16) / gpus / 3600}
    hours["SAE"] = sae_flops / (arguments.sae_share * 1e12 * GPU.fp32) / gpus / 3600
    micro_tokens = MICRO[gpus] * 2 * MAX_LENGTH
    activations = micro_tokens * (LAYERS * D * 4 + 2 * (12 * D + 4 * FFN))
    if full:
        steps = EPOCHS * PAIRS / (MICRO[gpus] * gpus)
        hours["FSDP2"] = steps * 3 * 4 * (BACKBONE + EMBEDDING + SAE) / LINK / 3600
        weights = {
            "weights, gradients, Adam": 16 * (BACKBONE + EMBEDDING + SAE) / gpus / GIB,
            "gathered": 8 * (EMBEDDING + SAE + 2 * LAYER) / GIB,  # and their gradients
        }
    else:
        adapters = RANK * LAYERS * (6 * D + 2 * KV + 2 * D + 3 * (D + FFN))
        weights = {
            "backbone bf16": 2 * (BACKBONE + EMBEDDING) / GIB,
            "SAE and adapters with Adam": 16 * (SAE + adapters) / GIB,
        }
    return Line(
        "reward model, mode 3" + ("" if full else ", LoRA"),
        gpus,
        hours,
        {**weights, "activations": activations / GIB},
    )


def table(argv: list[str] | None = None) -> str:
    """The estimates as Markdown."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--mfu", type=float, default=0.4, help="backbone: share of the bf16 peak")
    made.add_argument("--sae-share", type=float, default=0.5, help="SAE: share of its floor")
    made.add_argument("--pair-tokens", type=int, default=1000, help="mean of chosen and rejected")
    made.add_argument("--turn-tokens", type=int, default=600, help="of these, in the last turns")
    arguments = made.parse_args(argv)
    for name in ("mfu", "sae_share"):
        if not 0 < getattr(arguments, name) <= 1:
            made.error(f"--{name.replace('_', '-')} must be in (0, 1]")
    lines = [build(gpus, arguments) for build in (sae, reward) for gpus in (1, 8)]
    return "\n".join(
        [
            f"Estimates, not measurements: {GPU.name}, backbone at {arguments.mfu:.0%} of the bf16 "
            f"peak, SAE at {arguments.sae_share:.0%} of its roofline (fp32 units, not TF32); "
            f"{arguments.pair_tokens} tokens a pair.",
            "",
            "| | GPUs | hours | GiB a GPU |",
            "| --- | ---: | --- | --- |",
            *map(str, lines),
        ]
    )


if __name__ == "__main__":
    print(table())
