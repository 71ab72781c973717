"""Token mixing on one device: patterns, softmax attention, linear attention, rotary positions.

Tensors are ``[batch, time, heads, dim]``. Nothing here knows of ranks.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .blocklists import BlockLists
    from .convolution import short_convolution
    from .linear import linear_attention
    from .patterns import S2, Causal, Dilated, Pattern, PerHead, Sinks, Streaming, Stripes, Window
    from .rotary import apply_rotary, rotary_tables
    from .rules import Blocks
    from .selection import MoBA, Selector
    from .softmax import attend

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


def __getattr__(name: str):
    """Looks where the name lives when it is asked for: a recipe's patterns are checked without waiting for torch."""
    if name in __all__:
        for module in ("patterns", "rules", "blocklists", "selection", "softmax", "linear", "convolution", "rotary"):
            home = import_module(f".{module}", __name__)
            if hasattr(home, name):
                return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
