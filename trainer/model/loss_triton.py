"""The softmax of a tile of logits on Triton: two passes over logits that stay in their dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...attention.triton_device import on_device_of_first_argument

_BLOCK = 4096
"""Logits that a program computes at a time."""


@on_device_of_first_argument
def row_statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a softmax needs to know of the local part of each row, in fp32.

    Args:
        logits: ``[tokens, rows]``, contiguous.
        labels: int64 ``[tokens]``; those outside of the rows have no logit here.

    Returns:
        The largest logit, the sum of ``exp(logit - largest)``, and the label's logit or 0: each
        ``[tokens]``. Without any rows they are ``-inf``, 0 and 0.
    """
    num_tokens, num_rows = logits.shape
    largest = logits.new_full((num_tokens,), -torch.inf, dtype=torch.float32)
    sums = torch.zeros_like(largest)
    label_logits = torch.zeros_like(largest)
    if logits.numel():
        row_statistics_kernel[(num_tokens,)](
            logits, labels, largest, sums, label_logits, num_rows, logits.stride(0), BLOCK=_BLOCK
        )
    return largest, sums, label_logits


@on_device_of_first_argument
def logits_to_gradients(
    logits: Tensor, labels: Tensor, largest: Tensor, sums: Tensor, scale: Tensor
) -> None:
    """Overwrite logits with ``scale * (softmax - one_hot(label))``, rounded once.

    Args:
        largest: of the whole row, on all ranks, and ``sums`` likewise, each ``[tokens]``.
        scale: of each token, fp32 ``[tokens]``; a token with 0 gets zeros.
    """
    num_tokens, num_rows = logits.shape
    if logits.numel():
        logits_to_gradients_kernel[(num_tokens,)](
            logits, labels, largest, sums, scale, num_rows, logits.stride(0), BLOCK=_BLOCK
        )


@triton.jit
def row_statistics_kernel(
    LOGITS, LABELS, LARGEST, SUMS, LABEL_LOGITS, rows, stride, BLOCK: tl.constexpr
):
    """Read one token's logits once."""
    token = tl.program_id(0).to(tl.int64)
    LOGITS += token * stride
    label = tl.load(LABELS + token)
    # Each lane has a largest logit and a sum of its own until the end.
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        logit = tl.load(LOGITS + row, mask=row < rows, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, logit)
        # A lane that has seen nothing has a largest of -inf, whose difference is NaN.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - reference) + tl.exp(logit - reference)
        largest = new_largest
    row_largest = tl.max(largest)
    reference = tl.where(row_largest == float("-inf"), 0.0, row_largest)
    row_total = tl.sum(total * tl.exp(largest - reference))
    is_local = (label >= 0) & (label < rows)
    label_logit = tl.load(LOGITS + label, mask=is_local, other=0.0).to(tl.float32)
    tl.store(LARGEST + token, row_largest)
    tl.store(SUMS + token, row_total)
    tl.store(LABEL_LOGITS + token, label_logit)


@triton.jit
def logits_to_gradients_kernel(
    LOGITS, LABELS, LARGEST, SUMS, SCALE, rows, stride, BLOCK: tl.constexpr
):
    """Overwrite one token's logits."""
    token = tl.program_id(0).to(tl.int64)
    LOGITS += token * stride
    label = tl.load(LABELS + token)
    largest = tl.load(LARGEST + token)
    scale = tl.load(SCALE + token)
    factor = scale / tl.load(SUMS + token)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        logit = tl.load(LOGITS + row, mask=row < rows, other=0.0).to(tl.float32)
        grad = tl.exp(logit - largest) * factor
        grad = tl.where(row == label, grad - scale, grad)
        tl.store(LOGITS + row, grad.to(LOGITS.dtype.element_ty), mask=row < rows)
