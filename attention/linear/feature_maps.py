"""Feature maps: what linear attention has in the place of the softmax's exponential, so that weights are products."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import accumulation_dtype


def elu_plus_one(x: Tensor) -> Tensor:
    """Of each number, positive: ``elu(x) + 1`` (arXiv 2006.16236 eq. 7)."""
    return F.elu(x) + 1


def taylor(x: Tensor) -> Tensor:
    """Features whose products are the exponential's Taylor polynomial ``1 + s + s^2 / 2`` of ``s = q . k / sqrt(dim)`` (Based,
    arXiv 2402.18668 sec. 4.1): ``[..., dim]`` to ``[..., 1 + dim + dim (dim + 1) / 2]``.

    The paper counts all ``dim^2`` products; pairs that are equal are here one, larger by ``sqrt(2)``, as in fla.
    """
    dim = x.shape[-1]
    x = x * dim**-0.25
    first, second = torch.triu_indices(dim, dim, device=x.device)
    weights = torch.where(first == second, math.sqrt(0.5), 1.0).to(x.dtype)
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., first] * x[..., second] * weights], -1)


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """``[softmax(2 W x), softmax(-2 W x)]``, normalised together (arXiv 2402.04347): ``[..., heads, dim]`` to ``[..., 2 dim]``.

    The paper's eq. 6 has exponentials; their authors' code, like this, divides by the sum, which keeps them in bounds.

    Args:
        weight: ``[heads, dim, dim]``, the identity at first.
    """
    x = 2 * torch.einsum("...hd,hed->...he", x, weight)
    return torch.cat([x, -x], -1).to(accumulation_dtype(x)).softmax(-1).to(x.dtype)


def l2_normalized(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(|x|^2 + eps)`` over the last dim, in fp32 (fp64 for fp64), as the published delta-rule models."""
    wide = x.to(accumulation_dtype(x))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "elu": elu_plus_one,
    "taylor": taylor,
    "l2": l2_normalized,
}
"""Those without parameters, by the names that mixers have for them."""
