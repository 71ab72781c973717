"""Errors that are the user's to mend."""

import difflib

EXIT_STATUS = 2


class UserError(Exception):
    """Bad input: each line names a key or file, what is wrong and what to do. Commands print it and exit with 2."""


def suggest(word: str, known: list[str]) -> str:
    """`` (did you mean ...?)`` where a known word is close, else nothing."""
    close = difflib.get_close_matches(str(word), known, 1)
    return f" (did you mean {close[0]}?)" if close else ""
