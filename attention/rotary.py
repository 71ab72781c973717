"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split form that Hugging Face models use."""

import torch
from torch import Tensor

from .arguments import accumulation_dtype


def rotary_tables(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 ``[*positions.shape, dim / 2]``, for integer ``positions`` and an even ``dim``."""
    frequencies = theta ** (
        -torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    )
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``2 * cos.shape[-1]`` dims of ``x`` ``[batch, time, heads, dim]``; the rest pass unchanged.

    ``cos`` and ``sin`` are ``[batch, time, rotary_dim / 2]``. Computed in fp32 (fp64 for fp64), returned in ``x.dtype``.
    """
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    dtype = accumulation_dtype(x)
    halves = turning.unflatten(-1, (2, half)).to(dtype)
    cos, sin = cos[:, :, None, None].to(dtype), torch.stack([-sin, sin], -2)[:, :, None].to(dtype)
    rotated = torch.addcmul(halves * cos, halves.flip(-2), sin).flatten(-2).to(x.dtype)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated
