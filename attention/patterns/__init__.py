"""Which keys a query may see. Nothing here imports torch until a mask is asked for.

:class:`~longspan.attention.patterns.block_lists.BlockLists`, which is made of tensors, has to be
imported from its own module.
"""

from .base import ClosedFormPattern, Pattern, Union
from .patterns import S2, Causal, Dilated, PerHead, Sinks, Streaming, Stripes, Window
from .rules import Blocks, Rule
from .selection import MoBA, Selector

__all__ = [
    "S2",
    "Blocks",
    "Causal",
    "ClosedFormPattern",
    "Dilated",
    "MoBA",
    "Pattern",
    "PerHead",
    "Rule",
    "Selector",
    "Sinks",
    "Streaming",
    "Stripes",
    "Union",
    "Window",
]
