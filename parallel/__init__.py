"""The same operations over ranks: which token sits where, and what a batch's documents mean for each of them."""

from .layout import Layout
from .sequence import Sequence

__all__ = ["Layout", "Sequence"]
