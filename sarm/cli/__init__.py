"""The command line: `sarm` or `python -m sarm`; a module per command.

Bad input is one line on stderr and exit code 2; SARM_DEBUG=1 shows the traceback instead.
"""

from importlib import import_module

from sarm.cli.app import app, main

# importing a command's module registers it; in the order of `sarm --help`
for _command in (
    "info",
    "train_sae",
    "train_rm",
    "evaluate",
    "score",
    "explain",
    "features",
    "label",
    "steer",
    "audit",
    "serve",
    "dashboard",
    "demo",
):
    import_module(f"sarm.cli.{_command}")

__all__ = ["app", "main"]
