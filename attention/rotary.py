"""Rotary position embedding (RoFormer, arXiv 2104.09864).

In the half-split form that Hugging Face models use.
"""

import torch
from torch import Tensor

from .arguments import accumulation_dtype, has_kernels

Tables = tuple[Tensor, Tensor]
"""Cosines and sines of the tokens' angles, as :func:`rotary_tables` returns them."""


def rotary_tables(positions: Tensor, dim: int, theta: float) -> Tables:
    """Return the cosines and sines of integer ``positions`` for an even ``dim``.

    Both are fp32 ``[*positions.shape, dim / 2]``, of angles in fp64: an fp32 angle at position
    1,048,576 is off by up to 0.06.
    """
    exponents = -torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    frequencies = theta**exponents
    return angle_tables(positions[..., None], frequencies)


def angle_tables(positions: Tensor, frequencies: Tensor) -> Tables:
    """Return cosines and sines, in fp32, of the products of integer positions and frequencies."""
    angles = positions.double() * frequencies.double()
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``2 * cos.shape[-1]`` dims of ``x``; the others pass unchanged.

    Computed in fp32 (fp64 for fp64), by one kernel on CUDA.

    Args:
        x: ``[batch, time, heads, dim]``.
        cos, sin: ``[batch, time, rotary_dim / 2]``; they get no gradients on CUDA.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    if has_kernels(x):
        from .rotary_triton import rotate

        return rotate(x, cos, sin)

    dtype = accumulation_dtype(x)
    half = cos.shape[-1]
    rotary = x[..., : 2 * half]
    passed = x[..., 2 * half :]

    # (a, b) -> (a cos - b sin, b cos + a sin), where a and b are the two halves of the rotary dims.
    halves = rotary.unflatten(-1, (2, half)).to(dtype)  # [batch, time, heads, 2, half]
    swapped = halves.flip(-2)
    cos = cos[:, :, None, None].to(dtype)
    signed_sin = torch.stack([-sin, sin], -2)[:, :, None].to(dtype)  # [batch, time, 1, 2, half]
    rotated = torch.addcmul(halves * cos, swapped, signed_sin).flatten(-2).to(x.dtype)

    if not passed.shape[-1]:
        return rotated
    return torch.cat([rotated, passed], dim=-1)


def split_heads(
    projected: Tensor, group: int, num_gates: int, tables: Tables | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, gates, keys and values of a fused projection, the queries and keys rotated.

    On CUDA one kernel does it all, forward and backward, and leaves nothing behind that needs the
    projection: its memory is free then.

    Args:
        projected: ``[batch, time, KV heads, group + num_gates + 2, dim]``: for each KV head its
            queries, their gates, its key and its value.
        group: query heads of a KV head.
        num_gates: gates of a KV head.
        tables: of rotary angles, ``[batch, time, rotary_dim / 2]`` each; None to rotate nothing.

    Returns:
        Queries ``[batch, time, KV heads * group, dim]``, gates ``[batch, time, KV heads, num_gates,
        dim]``, keys and values ``[batch, time, KV heads, dim]``.
    """
    if has_kernels(projected):
        from .rotary_triton import split

        return split(projected, group, num_gates, tables)

    q, gate, k, v = projected.split([group, num_gates, 1, 1], dim=-2)
    q = q.flatten(2, 3)
    k = k.squeeze(-2)
    v = v.squeeze(-2)
    if tables is not None:
        q = apply_rotary(q, *tables)
        k = apply_rotary(k, *tables)
    return q, gate, k, v
