"""What the operations on one device have in common: how precisely they accumulate, and how they refuse bad arguments."""

from collections.abc import Collection

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def check_backend(backend: str, known: Collection[str]) -> None:
    """Refuse a name that is neither ``auto`` nor known."""
    if backend not in ("auto", *known):
        *most, last = known
        raise ValueError(f"backend must be auto, {', '.join(most)} or {last}, got {backend!r}")


def check_dims(**tensors: Tensor) -> None:
    """Refuse what has not four dimensions, by its name."""
    for name, tensor in tensors.items():
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must be [batch, time, heads, dim], got shape {tuple(tensor.shape)}"
            )
