"""Options that several commands have."""

from argparse import Namespace

from ..trainer.errors import UserError


def numbers(option: str, text: str, kind: type = int, least: float = 1, example: str = "") -> list:
    """Numbers between commas, in order and without repetition.

    Args:
        option: its name, for errors.
        kind: int or float.
        least: the smallest that is allowed.
        example: for errors.
    """
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        what, usual = ("whole numbers", "64,128") if kind is int else ("numbers", "1e-2,3e-3")
        raise UserError(f"{option}: must be {what}, as {example or usual}, got {text!r}") from None
    for value in values:
        if not value >= least:
            raise UserError(f"{option}: must be at least {least:g}, got {value}")
    return list(dict.fromkeys(values))


def counts(options: Namespace, *names: str) -> dict[str, int]:
    """Of these options, each at least 1."""
    found = {name: getattr(options, name) for name in names}
    for name, value in found.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {value}")
    return found
