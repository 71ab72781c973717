"""The same operations over ranks: which token sits where, what moves between them, and what a batch's documents mean to each.

``attend``, ``linear_attention`` and ``short_convolution`` take what :mod:`longspan.attention`'s do, and the layout and group of
the sequence.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .convolution import short_convolution
    from .layout import Layout
    from .linear import linear_attention
    from .schedules.names import Schedule
    from .sequence import Sequence
    from .softmax import attend

__all__ = ["Layout", "Schedule", "Sequence", "attend", "linear_attention", "short_convolution"]
_HOMES = {
    "Layout": "layout",
    "Schedule": "schedules.names",
    "Sequence": "sequence",
    "attend": "softmax",
    "linear_attention": "linear",
    "short_convolution": "convolution",
}


def __getattr__(name: str):
    """Import a public name's module when it is first asked for, so that a recipe's schedules are checked without torch."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
