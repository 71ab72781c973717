"""Errors that are the user's to mend."""

EXIT_STATUS = 2


class UserError(Exception):
    """Bad input: each line names a key or file, what is wrong and what to do. Commands print it and exit with 2."""
