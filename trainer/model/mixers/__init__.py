"""The token-mixing half of a layer, of every kind that a recipe may name."""

from .convolution import GatedConvolution
from .linear import LinearAttention
from .mixer import Mixer
from .softmax import SoftmaxAttention

__all__ = ["GatedConvolution", "LinearAttention", "Mixer", "SoftmaxAttention"]
