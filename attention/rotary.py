"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split form that Hugging Face models use."""

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 ``[*positions.shape, dim / 2]``, for integer ``positions`` and an even ``dim``."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``2 * cos.shape[-1]`` dims of ``x`` ``[batch, time, heads, dim]``; the rest pass unchanged.

    ``cos`` and ``sin`` are ``[batch, time, rotary_dim / 2]``. Computed in fp32 (fp64 for fp64), returned in ``x.dtype``.
    """
    half = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[:, :, None].to(dtype), sin[:, :, None].to(dtype)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated
