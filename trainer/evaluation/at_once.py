"""How much text a model is asked about at a time."""

_TOKENS = 2**14


def sequences_at_once(length: int) -> int:
    """Of so many tokens each, in one forward pass: its memory is bounded, unless one sequence is longer."""
    return max(1, _TOKENS // length)
