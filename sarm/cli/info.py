"""`sarm info`."""

from __future__ import annotations

import sys

import torch
from rich.table import Table

from sarm.cli.app import app, stdout


@app.command()
def info() -> None:
    """Versions, devices and op backends, and why each backend is or is not available."""
    from importlib.metadata import PackageNotFoundError, version

    import sarm

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    facts = Table(show_header=False, box=None)
    for name in ("torch", "transformers", "accelerate", "triton", "flash-attn", "bitsandbytes"):
        facts.add_row(name, installed(name))
    facts.add_row("python", sys.version.split()[0])
    facts.add_row(
        "CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    facts.add_row(
        "bf16 on the CPU",
        "native" if torch.cpu._is_avx512_bf16_supported() else "emulated (fp32 is used instead)",
    )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts.add_row("GPUs", ", ".join(gpus) or "none")
    stdout.print(f"sarm {sarm.__version__}")
    stdout.print(facts)
    table = Table("backend", "available", "ops", "why", box=None)
    for name, status in sarm.ops.backend_status().items():
        table.add_row(
            name, "yes" if status.available else "no", ", ".join(status.ops), status.reason
        )
    stdout.print(table)
