"""What a number depends on, and what the reader must know about this machine."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

NO_BF16 = (
    "This CPU has no bf16 instructions (AVX512-BF16 or AMX): its bf16 GEMM is slow, which "
    "flatters every bf16 ratio to the floor. fp32, and the column of the fp32 GEMM on upcast data, "
    "are the telling ones."
)
NO_GPU_TIME = "No GPU time has been measured yet: the floors below are data-sheet arithmetic."


def header(device: str) -> dict[str, str]:
    """Device, torch, threads, commit; on a CPU its bf16 instructions."""
    facts = {
        "device": f"{device} ({device_name(device)})",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "commit": commit(),
    }
    if device == "cpu":
        facts["bf16 instructions"] = bf16_instructions() or "none"
    return facts


def notes(device: str, dtypes: tuple[str, ...]) -> list[str]:
    """Plain lines under the header."""
    slow = device == "cpu" and "bf16" in dtypes and not bf16_instructions()
    return [NO_BF16] if slow else []


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return torch.backends.cpu.get_cpu_capability()


def bf16_instructions() -> str:
    """Those that a bf16 GEMM can use; "" if it has to upcast. Empty too where torch cannot tell."""
    tests = {"avx512_bf16": "_is_avx512_bf16_supported", "amx": "_is_amx_tile_supported"}
    found = [name for name, test in tests.items() if getattr(torch.cpu, test, lambda: False)()]
    return ", ".join(found)


def commit() -> str:
    """The short hash of the checkout, with a + if files differ from it."""
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text or "unknown"
