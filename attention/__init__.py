"""Token mixing on one device: patterns, softmax attention, linear attention, rotary positions.

Tensors are ``[batch, time, heads, dim]``. Nothing here knows of ranks.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .linear.attention import linear_attention
    from .linear.convolution import short_convolution
    from .patterns import (
        S2,
        Blocks,
        Causal,
        Dilated,
        MoBA,
        Pattern,
        PerHead,
        Selector,
        Sinks,
        Streaming,
        Stripes,
        Window,
    )
    from .patterns.block_lists import BlockLists
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

_MODULES = {
    "S2": "patterns",
    "BlockLists": "patterns.block_lists",
    "Blocks": "patterns",
    "Causal": "patterns",
    "Dilated": "patterns",
    "MoBA": "patterns",
    "Pattern": "patterns",
    "PerHead": "patterns",
    "Selector": "patterns",
    "Sinks": "patterns",
    "Streaming": "patterns",
    "Stripes": "patterns",
    "Window": "patterns",
    "apply_rotary": "rotary",
    "attend": "softmax.attend",
    "linear_attention": "linear.attention",
    "rotary_tables": "rotary",
    "short_convolution": "linear.convolution",
}


def __getattr__(name: str) -> object:
    """Import the module of a public name on first use, so that patterns cost no import of torch."""
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
