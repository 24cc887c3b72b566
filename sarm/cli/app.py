"""The typer application and its entry point: one line and exit code 2 on bad input."""

from __future__ import annotations

import atexit
import os
import sqlite3
import sys

import typer
from rich.console import Console
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from sarm.errors import InputError
from sarm.progress import stderr
from sarm.training.distributed.world import launched

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reward models that explain themselves: train, score, explain, steer.",
)
# a pipe or a file has no width: 80 columns would break tables for nothing
# no markup: file names and labels may hold brackets
stdout = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)


def main() -> None:
    """Entry point of the console script."""
    transformers_logging.disable_progress_bar()  # there are bars of our own
    try:
        _run()
    except SystemExit as end:
        if launched()[1] > 1:
            _end_member(end)
        raise


def _run() -> None:
    try:
        app()  # ends with SystemExit: 0, or 2 for usage errors
    except (InputError, OSError, SafetensorError, sqlite3.Error) as error:
        # safetensors and SQLite report a full disk with errors of their own
        if os.environ.get("SARM_DEBUG") == "1":
            raise
        _tell_launcher(error)
        stderr.print(f"sarm: {_one_line(error)}", markup=False, soft_wrap=True)
        sys.exit(2)


def _end_member(end: SystemExit) -> None:
    """End one of several processes without finalising the interpreter.

    A process group's threads may hold the last of a tensor. Before Python 3.14 a thread that asks
    for the interpreter while it is finalised is killed in the middle of C++, which aborts the
    process and so the job (https://github.com/python/cpython/issues/87135).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def _tell_launcher(error: BaseException) -> None:
    """Under torchrun: the error becomes part of its report of the process that failed first."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split())
