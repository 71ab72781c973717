"""Errors that the user can fix."""

import difflib

STOPPED = 75
"""Exit status of a run that was asked to stop and can be resumed: EX_TEMPFAIL of sysexits.h."""


class UserError(Exception):
    """Bad input: each line names a key or file, what is wrong with it and what to do.

    Commands print the lines and exit with ``exit_status``. Characters that cannot be printed, as
    a file's name may have, are escaped.
    """

    exit_status = 2

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(one_line(line) for line in message.split("\n")))


def one_line(text: str) -> str:
    """Return text with escapes for what cannot be printed, line breaks of any kind among it."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


class NonFiniteError(UserError):
    """Training cannot continue: the loss or its gradient is NaN or infinite."""

    exit_status = 3


class SilentRankError(UserError):
    """All ranks fail together, and another one has the message.

    This rank prints nothing and exits with the same status.
    """

    def __init__(self, exit_status: int = UserError.exit_status):
        super().__init__()
        self.exit_status = exit_status


def suggest(word: str, known: list[str]) -> str:
    """Return `` (did you mean ...?)`` if a known word is close, else an empty string."""
    close = difflib.get_close_matches(str(word), known, 1)
    return f" (did you mean {close[0]}?)" if close else ""
