"""The same operations over ranks: which token sits where, what moves between them, and what a batch's documents mean to each.

``attend``, ``linear_attention`` and ``short_convolution`` take what :mod:`longspan.attention`'s do, and the layout and group of
the sequence.
"""

from .convolution import short_convolution
from .layout import Layout
from .linear import linear_attention
from .sequence import Sequence
from .softmax import attend

__all__ = ["Layout", "Sequence", "attend", "linear_attention", "short_convolution"]
