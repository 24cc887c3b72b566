"""The one exception for what a user gave us and we cannot use."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: says what, where, what was expected and what came, in one line.

    The command line prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's text: enough for a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
