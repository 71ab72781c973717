"""Token mixing on one device: patterns, softmax attention, linear attention, rotary positions.

Tensors are ``[batch, time, heads, dim]``. Nothing here knows of ranks.
"""

from .linear import linear_attention
from .patterns import S2, Blocks, Causal, Pattern
from .rotary import apply_rotary, rotary_tables
from .softmax import attend

__all__ = [
    "S2",
    "Blocks",
    "Causal",
    "Pattern",
    "apply_rotary",
    "attend",
    "linear_attention",
    "rotary_tables",
]
