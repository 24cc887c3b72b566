"""Benchmarks: `python benches/run.py [--suite ops] [--json FILE] [--plot FILE]`.

Times are medians of alternating runs in one process on the machine that runs them; compare the
ratios, not the milliseconds. Run on a quiet machine. `--roofline` prints floor times by arithmetic.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import charts
import compare
import machine
import report
import tables
import torch
from suite import DTYPES, BenchError, Options, Shape

from sarm.errors import InputError

# Suite -> module of this folder with run(options) and plot(rows, path) (suite.py).
SUITES = {
    "ops": "ops",
    "ops-scaling": "scaling",
    "score": "score",
    "prefix": "prefix",
    "agreement": "agreement",
    "llama8b": "llama8b",
    "serve": "serve",
    "train-rm": "train_rm",
    "train-sae": "train_sae",
    "features": "features",
    "train-scaling": "train_scaling",
}


class Parser(argparse.ArgumentParser):
    """Errors are one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"run.py: {message}\n")


def parser() -> Parser:
    made = Parser(prog="run.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument(
        "--suite",
        default="ops",
        metavar="NAME[,NAME]",
        help=f"{' | '.join(SUITES)}; several with commas; default ops",
    )
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    made.add_argument(
        "--dtype",
        action="append",
        metavar="NAME[,NAME]",
        help="bf16 | fp32 | fp16; repeatable; default bf16,fp32",
    )
    made.add_argument(
        "--shape",
        action="append",
        metavar="N,D,L,K",
        help="instead of the suite's shapes; repeatable",
    )
    made.add_argument(
        "--only", metavar="PATTERN", help="case, candidate or case/candidate; * and ? as in a shell"
    )
    made.add_argument("--runs", type=int, default=5)
    made.add_argument("--threads", type=int, help="of PyTorch; default: its own choice")
    made.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    made.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="real conversations: rm_bench/, preferences_valid.jsonl.gz ($SARM_DATA)",
    )
    made.add_argument("--prompts", type=int, default=40, help="suites score, serve: how many")
    made.add_argument(
        "--items", type=int, default=100, help="suite agreement: of each data set; 0: all"
    )
    made.add_argument(
        "--model", type=Path, metavar="SARM", help="a checkpoint instead of random weights"
    )
    made.add_argument("--quantization", choices=("int8",), help="suite serve: of the served model")
    made.add_argument("--minutes", type=float, default=0, help="suite serve: keep the load up")
    made.add_argument("--pairs", type=int, default=16, help="suite train-rm: how many")
    made.add_argument(
        "--shortest", action="store_true", help="suite train-rm: the shortest pairs, not a sample"
    )
    made.add_argument(
        "--micro-batch", type=int, default=1, help="suite train-rm: pairs that sarm packs together"
    )
    made.add_argument(
        "--max-length", type=int, default=4096, help="suites train-rm, agreement: tokens"
    )
    made.add_argument("--documents", type=int, default=16, help="suite train-sae: how many")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    made.add_argument(
        "--markdown", type=Path, metavar="PAGE", help="fill the page's places (tables.py)"
    )
    made.add_argument("--plot", type=Path, metavar="FILE", help=" | ".join(charts.FORMATS))
    made.add_argument("--compare-to", type=Path, metavar="FILE", help="JSON of an earlier run")
    made.add_argument(
        "--fail-on-regression",
        type=float,
        metavar="PCT",
        help="exit code 1 if a ratio of sarm is worse than before by more than PCT %% and by more "
        "than the runs' spread",
    )
    made.add_argument("--roofline", action="store_true", help="floor times of A100 to B200")
    return made


def options_of(arguments: argparse.Namespace) -> Options:
    """Checked before anything runs, so that no minute of timing is lost to a typo."""
    cuda = torch.cuda.is_available()
    device = arguments.device or ("cuda" if cuda else "cpu")
    if device == "cuda" and not cuda:
        raise BenchError("--device cuda: torch finds no CUDA device")
    dtypes = [d for text in arguments.dtype or ("bf16,fp32",) for d in text.split(",")]
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise BenchError(f"--dtype: expected {' | '.join(DTYPES)}, got {dtype!r}")
    if arguments.runs < 1:
        raise BenchError(f"--runs must be >= 1, got {arguments.runs}")
    suites = arguments.suite.split(",")
    for name in suites:
        if name not in SUITES:
            raise BenchError(f"--suite: expected {' | '.join(SUITES)}, got {name!r}")
    if arguments.threads is not None and arguments.threads < 1:
        raise BenchError(f"--threads must be >= 1, got {arguments.threads}")
    if arguments.items < 0:
        raise BenchError(f"--items must be >= 0, got {arguments.items}")
    if arguments.quantization is not None and "serve" not in suites:
        raise BenchError("--quantization belongs to --suite serve; the others time 8 bits anyway")
    if arguments.plot and len(suites) > 1:
        raise BenchError(f"--plot draws one suite, got {arguments.suite}")
    if arguments.markdown is not None and not arguments.markdown.is_file():
        raise BenchError(f"--markdown {arguments.markdown}: no such file")
    for name in ("prompts", "pairs", "max_length", "documents", "micro_batch"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            raise BenchError(f"--{option} must be >= 1, got {getattr(arguments, name)}")
    data = arguments.data or (Path(os.environ["SARM_DATA"]) if "SARM_DATA" in os.environ else None)
    if data is not None and not data.is_dir():
        raise BenchError(f"--data {data}: no such folder")
    if arguments.model is not None and not arguments.model.is_dir():
        raise BenchError(f"--model {arguments.model}: no such folder")
    if not arguments.minutes >= 0:
        raise BenchError(f"--minutes must be >= 0, got {arguments.minutes}")
    for name in ("json", "plot"):
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():
            raise BenchError(f"--{name} {path}: no folder {path.parent}")
    if arguments.plot and arguments.plot.suffix not in charts.FORMATS:
        raise BenchError(f"--plot must end in {' | '.join(charts.FORMATS)}, got {arguments.plot}")
    if arguments.fail_on_regression is not None and not arguments.compare_to:
        raise BenchError("--fail-on-regression needs --compare-to FILE")
    if arguments.roofline and arguments.suite != "ops":
        raise BenchError(f"--roofline belongs to --suite ops, got --suite {arguments.suite}")
    shapes = None
    if arguments.shape:
        try:
            shapes = tuple(Shape.parse(text) for text in arguments.shape)
        except ValueError as error:
            raise BenchError(f"--shape: {error}") from None
    return Options(
        device=device,
        dtypes=tuple(dict.fromkeys(dtypes)),
        shapes=shapes,
        runs=arguments.runs,
        only=arguments.only,
        memory=not arguments.no_memory,
        data=data,
        prompts=arguments.prompts,
        items=arguments.items,
        model=arguments.model,
        quantization=arguments.quantization,
        minutes=arguments.minutes,
        pairs=arguments.pairs,
        shortest=arguments.shortest,
        micro_batch=arguments.micro_batch,
        max_length=arguments.max_length,
        documents=arguments.documents,
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )


def bench(arguments: argparse.Namespace) -> int:
    """The exit code."""
    options = options_of(arguments)
    earlier = compare.read(arguments.compare_to, arguments.suite) if arguments.compare_to else None
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    suites: list[Any] = [importlib.import_module(SUITES[n]) for n in arguments.suite.split(",")]
    facts = machine.header(options.device)
    out = report.console()
    out.print("  ".join(f"{name} {value}" for name, value in facts.items()))
    for note in machine.notes(options.device, options.dtypes):
        out.print(note)
    out.print()
    if arguments.roofline:
        out.print(machine.NO_GPU_TIME)
        report.print_roofline(out, options, suites[0].SHAPES)
        if options.device != "cuda":
            return 0
    rows = []
    for suite in suites:
        found = suite.run(options)
        report.print_rows(out, found)
        rows += found
    if arguments.roofline:
        report.print_fractions(out, rows, torch.cuda.get_device_name())
    if arguments.json:
        compare.write(arguments.json, arguments.suite, facts, rows)
    if arguments.markdown:
        tables.fill(arguments.markdown, [(facts, rows)])
    if arguments.plot:
        suites[0].plot(rows, arguments.plot)
    if earlier is None:
        return 0
    header, old = earlier
    changes = compare.changes(old, rows)
    report.print_changes(out, changes, header, facts)
    if arguments.fail_on_regression is None:
        return 0
    return 1 if compare.regressions(changes, arguments.fail_on_regression) else 0


def main(argv: list[str] | None = None) -> int:
    made = parser()
    arguments = made.parse_args(argv)
    try:
        return bench(arguments)
    except (BenchError, InputError) as error:
        made.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
