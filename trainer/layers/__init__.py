"""The kinds of layer. Each is one class that owns all that is known about it, beside the module that computes it.

What says a recipe's layers (``base``, ``softmax``, ``linear``, ``convolution``, ``registry``) imports no torch.
"""
