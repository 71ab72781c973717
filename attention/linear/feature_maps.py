"""Feature maps: what linear attention has in place of the exponential of softmax.

With them the weights of keys are products of features.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import accumulation_dtype
from ..operation import operation, recomputed


def elu_plus_one(x: Tensor) -> Tensor:
    """Return ``elu(x) + 1``, which is positive (arXiv 2006.16236 eq. 7)."""
    return F.elu(x) + 1


def taylor(x: Tensor) -> Tensor:
    """Return features whose products are the exponential's Taylor polynomial ``1 + s + s^2 / 2``.

    ``s = q . k / sqrt(dim)`` (Based, arXiv 2402.18668 sec. 4.1). From ``[..., dim]`` to
    ``[..., 1 + dim + dim (dim + 1) / 2]``. The paper counts all ``dim^2`` products; pairs that are
    equal are here one, larger by ``sqrt(2)``, as in fla.
    """
    dim = x.shape[-1]
    x = x * dim**-0.25
    first, second = torch.triu_indices(dim, dim, device=x.device)
    weights = torch.where(first == second, math.sqrt(0.5), 1.0).to(x.dtype)
    products = x[..., first] * x[..., second] * weights
    return torch.cat([torch.ones_like(x[..., :1]), x, products], -1)


@operation
def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``[softmax(2 W x), softmax(-2 W x)]``, normalized together (arXiv 2402.04347).

    From ``[..., heads, dim]`` to ``[..., heads, 2 dim]``. The paper's eq. 6 has exponentials; its
    authors' code, like this, divides by the sum, which keeps them in bounds.

    Args:
        weight: ``[heads, dim, dim]``, the identity at first.
    """
    x = recomputed(_projected_twice, x, weight)
    return torch.cat([x, -x], -1).to(accumulation_dtype(x)).softmax(-1).to(x.dtype)


def _projected_twice(x: Tensor, weight: Tensor) -> Tensor:
    return 2 * torch.einsum("...hd,hed->...he", x, weight)


def l2_normalized(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return ``x / sqrt(|x|^2 + eps)`` over the last dim, as the published delta-rule models do.

    Computed in fp32 (fp64 for fp64).
    """
    wide = x.to(accumulation_dtype(x))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def identity(x: Tensor) -> Tensor:
    """Return ``x``."""
    return x


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": identity,
    "elu": elu_plus_one,
    "taylor": taylor,
    "l2": l2_normalized,
}
"""Feature maps without parameters, by the names that mixers have for them."""
