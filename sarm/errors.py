"""The one exception for what a user gave us and we cannot use."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: says what, where, what was expected and what came, in one line.

    The command line prints it without a traceback and exits with code 2.
    """
