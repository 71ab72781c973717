"""Short causal convolutions along time, one filter per channel.

Linear mixers pass queries, keys and values through them.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from ..arguments import accumulation_dtype
from ..documents import check_documents
from ..operation import operation


@overload
def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    return_state: Literal[False] = False,
) -> Tensor: ...


@overload
def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@operation
def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``y_t = bias + sum_j weight_j x_{t - width + 1 + j}`` over ``t``'s document.

    Args:
        x: ``[batch, time, channels]``.
        weight: ``[channels, width]``, the last column for the token itself (as in
            ``torch.nn.functional.conv1d``).
        bias: ``[channels]``.
        state: ``[batch, width - 1, channels]``, the tokens before the first, 0 where they are not
            of its document.
        documents: int ``[batch, time]``, non-decreasing.
        return_state: also return the last ``width - 1`` tokens, as the ``state`` of tokens that
            continue the last one's document.

    Returns:
        ``[batch, time, channels]`` in the dtype of ``x``, added up in fp32 (fp64 for fp64); and the
        state with ``return_state``.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            "x must be [batch, time, channels] and weight [channels, width], "
            f"got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    batch, length, channels = x.shape
    reach = weight.shape[1] - 1  # how many earlier tokens an output depends on
    if state is not None and state.shape != (batch, reach, channels):
        raise ValueError(f"state must be {(batch, reach, channels)}, got {tuple(state.shape)}")
    documents = check_documents(documents, (batch, length))

    # The tokens before the first, and then all: [batch, reach + time, channels].
    before = x.new_zeros(batch, reach, channels) if state is None else state.to(x.dtype)
    padded = torch.cat([before, x], 1)
    if documents is not None:  # what comes before the first token is of its document, or 0
        padded_ids = torch.cat([documents[:, :1].expand(-1, reach), documents], 1)

    dtype = accumulation_dtype(x)
    total = torch.zeros((), dtype=dtype, device=x.device) if bias is None else bias.to(dtype)
    for lag in range(reach + 1):
        lagged = slice(reach - lag, reach - lag + length)
        tokens = padded[:, lagged]
        if lag and documents is not None:
            # A choice: a factor of 0 would let NaN through.
            tokens = tokens.where((padded_ids[:, lagged] == documents)[..., None], 0.0)
        total = total + tokens.to(dtype) * weight[:, reach - lag].to(dtype)
    out = total.to(x.dtype)
    if not return_state:
        return out

    last = padded[:, length:]
    if documents is not None:
        last = last.where((padded_ids[:, length:] == documents[:, -1:])[..., None], 0.0)
    return out, last
