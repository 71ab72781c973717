"""Log-decays of linear attention: the fixed ones of published models, and their sums.

A fixed decay is fp32 ``[heads]``, at most 0. Two that are both called lightning's differ: see
:func:`lightning_paper`.
"""

import torch
from torch import Tensor


def minimax(heads: int, layer: int, layers: int) -> Tensor:
    """Return MiniMax-01's decays (`minimax` in transformers).

    They are ALiBi's slopes ``2^(-8 (h + 1) / heads)``, weaker from layer to layer (from 0), all but
    gone in the last. TransNormerLLM's code has the same for numbers of heads that are powers of
    two, except for what is left in the last layer, 1e-5 of the slopes against 1.3e-5; for others it
    interleaves the slopes of two powers of two.
    """
    slopes = 2 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
    layer_factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    return -(slopes * layer_factor).float()


def lightning_paper(heads: int, layer: int, layers: int) -> Tensor:
    """Return ``-8 h / heads (1 - layer / layers)`` for ``h = 0 ... heads - 1``.

    As in arXiv 2307.14995 eq. 10 and in fla's lightning attention. No published model was trained
    with it: their code has :func:`minimax`.
    """
    slopes = 8 * torch.arange(heads, dtype=torch.float64) / heads
    return -(slopes * (1 - layer / layers)).float()


def retention(heads: int, layer: int, layers: int) -> Tensor:
    """Return ``log(1 - 2^(-5 - h))``, the same in every layer (RetNet, arXiv 2307.08621 eq. 8)."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float64)))).float()


def decay_to_end(log_decay: Tensor, dim: int) -> Tensor:
    """Return the sum of the log-decays after each token, along ``dim``: 0 for the last token.

    They are added up from the end: a difference of two sums would lose the small ones.
    """
    from_token_on = log_decay.flip(dim).cumsum(dim).flip(dim)
    first, rest = from_token_on.tensor_split([1], dim)
    return torch.cat([rest, torch.zeros_like(first)], dim)
