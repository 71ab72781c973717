"""Short causal convolutions along time, one filter per channel, through which linear mixers take queries, keys and values."""

import torch
from torch import Tensor

from ..arguments import accumulation_dtype
from ..documents import check_documents


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``y_t = bias + sum_j weight_j x_{t - width + 1 + j}`` over the tokens of ``t``'s document.

    Args:
        x: ``[batch, time, channels]``.
        weight: ``[channels, width]``, the last column for the token itself (as in ``torch.nn.functional.conv1d``).
        bias: ``[channels]``.
        state: ``[batch, width - 1, channels]``, the tokens before the first, 0 where they are not of its document.
        documents: int ``[batch, time]``, non-decreasing.
        return_state: also return the last ``width - 1`` tokens, for one that goes on in the last one's document.

    Returns:
        ``[batch, time, channels]`` in the dtype of ``x``, added up in fp32 (fp64 for fp64); and the state where asked for.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            f"x must be [batch, time, channels] and weight [channels, width], got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    batch, length, channels = x.shape
    reach = weight.shape[1] - 1
    if state is not None and state.shape != (batch, reach, channels):
        raise ValueError(f"state must be {(batch, reach, channels)}, got {tuple(state.shape)}")
    documents = check_documents(documents, (batch, length))
    # What came before the first token is of its document, or 0.
    ids = (
        None if documents is None else torch.cat([documents[:, :1].expand(-1, reach), documents], 1)
    )
    before = x.new_zeros(batch, reach, channels) if state is None else state.to(x.dtype)
    seen, dtype = torch.cat([before, x], 1), accumulation_dtype(x)
    total = 0.0 if bias is None else bias.to(dtype)
    for lag in range(reach + 1):
        at = slice(reach - lag, reach - lag + length)
        tap = seen[:, at].to(dtype) * weight[:, reach - lag].to(dtype)
        if lag and ids is not None:
            tap = tap * (ids[:, at] == documents)[..., None]
        total = total + tap
    out = total.to(x.dtype)
    if not return_state:
        return out
    last = seen[:, length:]
    return out, last if ids is None else last * (ids[:, length:] == documents[:, -1:])[..., None]
