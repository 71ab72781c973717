"""Errors that are the user's to mend."""

import difflib

STOPPED = 75
"""Exit status of a run that was asked to stop and can go on: sysexits' EX_TEMPFAIL."""


class UserError(Exception):
    """Bad input: each line names a key or file, what is wrong and what to do. Commands print it and exit with its status."""

    exit_status = 2


class NonFiniteError(UserError):
    """Training cannot go on: the loss or its gradient is NaN or infinite."""

    exit_status = 3


def suggest(word: str, known: list[str]) -> str:
    """`` (did you mean ...?)`` where a known word is close, else nothing."""
    close = difflib.get_close_matches(str(word), known, 1)
    return f" (did you mean {close[0]}?)" if close else ""
