"""Errors about arguments that cannot be used, and the checks that raise them, without torch."""


class InvalidField(ValueError):  # noqa: N818 - named after what it says
    """A field of a pattern or of a layer has a value that cannot be used.

    A recipe's checks put the key of the section before ``field``; everybody else reads the whole
    sentence ``{owner}.{field} {reason}``.

    Args:
        field: the name of the field, for example ``block``.
        reason: what is wrong and how to fix it, for example ``must be a power of two, got 3``.
        owner: the class that has the field, as ``S2``; empty if the name of the field is enough.
    """

    def __init__(self, field: str, reason: str, owner: str = ""):
        super().__init__(f"{owner}.{field} {reason}" if owner else f"{field} {reason}")
        self.field = field
        self.reason = reason


def check_at_least(owner: str, field: str, value: object, minimum: int) -> None:
    """Raise InvalidField unless ``value`` is a whole number of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        reason = f"must be a whole number of at least {minimum}, got {value!r}"
        raise InvalidField(field, reason, owner)


def check_power_of_two(owner: str, field: str, value: int) -> None:
    """Raise InvalidField, which names the nearest ones, unless ``value`` is a power of two."""
    check_at_least(owner, field, value, 1)
    if value & (value - 1):
        above = 1 << value.bit_length()
        reason = f"must be a power of two, got {value}; {above // 2} and {above} are the nearest"
        raise InvalidField(field, reason, owner)
