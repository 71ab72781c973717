"""What is raised where an argument cannot be used. Nothing here imports torch."""


class InvalidField(ValueError):  # noqa: N818 - named after what it says
    """A field of a pattern or of a layer that cannot have its value.

    A recipe's checks add the key of the section to ``field``; anybody else reads the sentence
    ``{owner}.{field} {reason}``.

    Args:
        field: the field's name, as ``block``.
        reason: what is wrong with it and what to do, as ``must be a power of two, got 3``.
        owner: what has the field, as ``S2``; empty where the field's name says enough.
    """

    def __init__(self, field: str, reason: str, owner: str = ""):
        super().__init__(f"{owner}.{field} {reason}" if owner else f"{field} {reason}")
        self.field = field
        self.reason = reason
