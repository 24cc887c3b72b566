"""`sarm eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sarm.cli.app import app, stdout
from sarm.cli.options import Dtype, MaxLength, Quantization, Threads, float_type, use_threads
from sarm.errors import InputError
from sarm.progress import bars


@app.command("eval")
def evaluate(
    model: Annotated[
        list[Path],
        typer.Option("--model", "-m", help="SARM checkpoint directory; repeat to compare."),
    ],
    preferences: Annotated[
        list[str] | None, typer.Option(help="Preference pairs in one of TRL's formats.")
    ] = None,
    reward_bench_2: Annotated[list[str] | None, typer.Option(help="RewardBench 2.")] = None,
    rm_bench: Annotated[list[str] | None, typer.Option(help="RM-Bench.")] = None,
    judge_bench: Annotated[list[str] | None, typer.Option(help="JudgeBench.")] = None,
    rmb: Annotated[list[str] | None, typer.Option(help="RMB, pairwise or best-of-n.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for JSON, Markdown and plots.")
    ] = None,
    probe: Annotated[bool, typer.Option(help="Also judge the dense probe of train-rm.")] = False,
    max_length: MaxLength = 4096,
    cache: Annotated[
        list[Path] | None,
        typer.Option(help="SQLite file of scored-token states: one for all models, or one each."),
    ] = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    threads: Threads = None,
) -> None:
    """Benchmarks with 95 % intervals over prompts, models side by side; see docs/evaluation.md.

    A benchmark is a file, a folder or hub:owner/name[:split]; repeat an option to add files.
    """
    import sarm
    from sarm.evaluation import benchmarks, report
    from sarm.evaluation.run import run_benchmarks

    use_threads(threads)
    suite = [benchmarks.preferences(source) for source in preferences or []]
    suite += [benchmarks.reward_bench_2(*reward_bench_2)] if reward_bench_2 else []
    suite += [benchmarks.rm_bench(*rm_bench)] if rm_bench else []
    suite += [benchmarks.judge_bench(source) for source in judge_bench or []]
    suite += [benchmarks.rmb(*rmb)] if rmb else []
    suite = benchmarks.named_apart(suite)
    if not suite:
        raise InputError(
            "eval: nothing to do; pass --preferences, --reward-bench-2, --rm-bench, --judge-bench "
            "or --rmb"
        )
    with bars() as add:
        bar = add("backbone, tokens", None)
        results = run_benchmarks(
            model,
            suite,
            max_length=max_length,
            caches=cache or [],
            probe=probe,
            dtype=float_type(dtype),
            quantization=quantization,
            progress=bar.to,
        )
    table = Table(*report.headings(results)[1:], box=None)
    table.columns[0].no_wrap = True
    for before, result in zip([None, *results], results, strict=False):
        if before is None or before.benchmark != result.benchmark:
            table.add_row(result.benchmark, style="bold")
        table.add_row(f"  {result.measure}", *report.cells(result)[2:])
    stdout.print(table)
    if out:
        settings = {
            "sarm": sarm.__version__,
            "max_length": max_length,
            "dtype": dtype or "default",
            "quantization": quantization or "as saved",
        }
        report.write_report(results, suite, settings, out)
