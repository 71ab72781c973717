"""What the operations on one device share: the precision of sums, and checks of arguments."""

from collections.abc import Collection

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which sums over ``x`` are computed: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def check_backend(backend: str, known: Collection[str]) -> None:
    """Raise ValueError unless ``backend`` is ``auto`` or one of the known names."""
    if backend not in ("auto", *known):
        *most, last = known
        raise ValueError(f"backend must be auto, {', '.join(most)} or {last}, got {backend!r}")


def check_dims(**tensors: Tensor) -> None:
    """Raise ValueError naming any tensor that is not 4-dimensional."""
    for name, tensor in tensors.items():
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must be [batch, time, heads, dim], got shape {tuple(tensor.shape)}"
            )
