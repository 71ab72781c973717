"""Token mixing on one device: patterns, softmax attention, linear attention, rotary positions.

Tensors are ``[batch, time, heads, dim]``. Nothing here knows of ranks.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .linear.attention import linear_attention
    from .linear.convolution import short_convolution
    from .patterns.block_lists import BlockLists
    from .patterns.patterns import (
        S2,
        Causal,
        Dilated,
        Pattern,
        PerHead,
        Sinks,
        Streaming,
        Stripes,
        Window,
    )
    from .patterns.rules import Blocks
    from .patterns.selection import MoBA, Selector
    from .rotary import apply_rotary, rotary_tables
    from .softmax.attend import attend

__all__ = [
    "S2",
    "BlockLists",
    "Blocks",
    "Causal",
    "Dilated",
    "MoBA",
    "Pattern",
    "PerHead",
    "Selector",
    "Sinks",
    "Streaming",
    "Stripes",
    "Window",
    "apply_rotary",
    "attend",
    "linear_attention",
    "rotary_tables",
    "short_convolution",
]

_HOMES = {
    "S2": "patterns.patterns",
    "BlockLists": "patterns.block_lists",
    "Blocks": "patterns.rules",
    "Causal": "patterns.patterns",
    "Dilated": "patterns.patterns",
    "MoBA": "patterns.selection",
    "Pattern": "patterns.patterns",
    "PerHead": "patterns.patterns",
    "Selector": "patterns.selection",
    "Sinks": "patterns.patterns",
    "Streaming": "patterns.patterns",
    "Stripes": "patterns.patterns",
    "Window": "patterns.patterns",
    "apply_rotary": "rotary",
    "attend": "softmax.attend",
    "linear_attention": "linear.attention",
    "rotary_tables": "rotary",
    "short_convolution": "linear.convolution",
}


def __getattr__(name: str):
    """Import a public name's module when it is first asked for, so that patterns cost no torch."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
