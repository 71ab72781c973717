"""The operations of :mod:`longspan.attention` over ranks that share a sequence.

A :class:`Layout` says which token sits on which rank, a :class:`Schedule` what moves between ranks,
and a :class:`Sequence` which documents a batch has. ``attend``, ``linear_attention`` and
``short_convolution`` accept what those of :mod:`longspan.attention` do, and the layout and group of
the sequence.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convolution import short_convolution
    from .layout import Layout
    from .linear import linear_attention
    from .schedules.names import Schedule
    from .sequence import Sequence
    from .softmax import attend

__all__ = ["Layout", "Schedule", "Sequence", "attend", "linear_attention", "short_convolution"]

_MODULES = {
    "Layout": "layout",
    "Schedule": "schedules.names",
    "Sequence": "sequence",
    "attend": "softmax",
    "linear_attention": "linear",
    "short_convolution": "convolution",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module on first use, so that checking a recipe imports no torch."""
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
