"""The loss of a language model without all of its logits: one tile of tokens at a time, over a
vocabulary that tensor-parallel ranks share.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...attention.arguments import has_kernels
from ...attention.operation import without_autocast


@without_autocast
def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    tile: int = 1024,
) -> Tensor:
    """Return the sum of ``token_weights * -log softmax(hidden @ weight.T)[labels]``, in nats, with
    its gradients of ``hidden`` and ``weight``.

    The gradients are computed in the forward pass, while a tile's logits exist, and scaled in the
    backward pass: the three matrix products of a plain loss, and no logits but those of one tile
    (the fused linear cross-entropy of Liger Kernel, arXiv 2410.10989).

    Args:
        hidden: ``[tokens, hidden]``, the same on every rank of ``group``; its gradient here is that
            of this rank's part of the vocabulary.
        weight: this rank's rows ``[local vocabulary, hidden]``; ranks hold consecutive rows.
        labels: int64 ``[tokens]``, ids of the whole vocabulary. Those of tokens with weight 0 may
            be anything, like -100.
        token_weights: ``[tokens]``; not differentiated.
        group: the ranks that share the vocabulary; None for one.
        vocab_size: rows of the whole vocabulary that are not padding; None for all.
        tile: number of tokens whose logits exist at a time.

    Returns:
        A scalar, fp32 (fp64 for fp64), the same on every rank of ``group``.

    Raises:
        ValueError: a token has no label, or one that is not in the vocabulary, and a weight. On
            CUDA this is an assertion of the device, so as not to wait for it.
    """
    _check_labels(hidden, weight, labels, token_weights, group, vocab_size)
    if not torch.is_grad_enabled():
        # autograd would still ask for the gradients of tensors that require one
        hidden = hidden.detach()
        weight = weight.detach()
    first_row, num_real = _local_vocabulary(weight, group, vocab_size)
    local_labels = labels - first_row
    return _CrossEntropySum.apply(
        hidden, weight, local_labels, token_weights, group, num_real, tile
    )


@without_autocast
@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    tile: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Return ``-log softmax(hidden @ weight.T)[labels]`` of each token, in nats, and whether its
    label is the likeliest id; both ``[tokens]``, without gradients.

    The arguments are those of :func:`cross_entropy_sum`, but all labels must be in the vocabulary.
    """
    _check_labels(hidden, weight, labels, None, group, vocab_size)
    first_row, num_real = _local_vocabulary(weight, group, vocab_size)
    dtype = _accumulation_dtype(hidden)
    losses = []
    is_likeliest = []
    for part in _tiles(hidden, weight[:num_real], labels - first_row, group, dtype, tile):
        likeliest = _likeliest_ids(part, first_row, num_real)
        if group is not None and group.size() > 1:
            dist.all_reduce(likeliest, dist.ReduceOp.MIN, group=group)
        losses.append(part.losses)
        is_likeliest.append(likeliest == labels[part.tokens])
    return torch.cat(losses), torch.cat(is_likeliest)


def _check_labels(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
) -> None:
    """Raise ValueError unless every token that counts has a label of the vocabulary."""
    num_tokens = len(hidden)
    for name, tensor in {"labels": labels, "token_weights": token_weights}.items():
        if tensor is not None and tensor.shape != (num_tokens,):
            raise ValueError(
                f"{name} must be one for each of the {num_tokens} tokens, got {tuple(tensor.shape)}"
            )
    if vocab_size is None:
        vocab_size = weight.shape[0] * (group.size() if group else 1)
    is_outside = (labels < 0) | (labels >= vocab_size)
    if token_weights is not None:
        is_outside &= token_weights != 0
    fix = "give tokens without a label the weight 0"
    if labels.is_cuda:
        torch._assert_async(~is_outside.any(), f"a label is not in 0 .. {vocab_size - 1}; {fix}")
    elif is_outside.any():
        token = int(is_outside.nonzero()[0])
        raise ValueError(
            f"labels: {int(labels[token])}, of token {token}, is not in 0 .. {vocab_size - 1}; "
            f"{fix}"
        )


def _likeliest_ids(tile: "_Tile", first_row: int, num_real: int) -> Tensor:
    """Return the first id of this rank with the largest logit of all ranks, or the largest int64 if
    another rank has it: int64 ``[tokens]``.
    """
    nowhere = torch.full_like(tile.label_rows[:, 0], torch.iinfo(torch.int64).max)
    if not num_real:
        return nowhere
    has_largest = tile.exponentials.amax(1) == 1  # logits are less the largest of all ranks
    return (tile.exponentials.argmax(1) + first_row).where(has_largest, nowhere)


def _local_vocabulary(
    weight: Tensor, group: dist.ProcessGroup | None, vocab_size: int | None
) -> tuple[int, int]:
    """Return the id of this rank's first row, and how many of its rows are not padding."""
    num_rows = weight.shape[0]
    first_row = num_rows * (group.rank() if group else 0)
    if vocab_size is None:
        return first_row, num_rows
    return first_row, max(0, min(vocab_size - first_row, num_rows))


def _accumulation_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class _Tile(NamedTuple):
    """The softmax of some tokens, as far as this rank's part of the vocabulary goes."""

    tokens: slice
    exponentials: Tensor
    """Of the logits less the largest of all ranks: ``[tokens, real rows]``. The next tile may reuse
    the memory."""
    sums: Tensor
    """Sums of the exponentials over the whole vocabulary: ``[tokens]``."""
    losses: Tensor
    """``[tokens]``."""
    label_rows: Tensor
    """This rank's row of each label, ``[tokens, 1]``, if the label ``is_local``."""
    is_local: Tensor
    """Whether this rank has the label's row: bool ``[tokens]``."""


def _tiles(
    hidden: Tensor,
    real_weight: Tensor,
    local_labels: Tensor,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype,
    tile: int,
) -> Iterator[_Tile]:
    """Yield the softmax of ``tile`` tokens after another.

    Args:
        real_weight: this rank's rows that are not padding, ``[real rows, hidden]``.
        local_labels: labels, counted from this rank's first row.
        dtype: of all results.
    """
    num_real = len(real_weight)
    is_shared = group is not None and group.size() > 1
    # One buffer for all tiles: on a CPU, new memory takes as long as the product.
    buffer = hidden.new_empty(min(tile, len(hidden)), num_real)
    for start in range(0, len(hidden), tile):
        tokens = slice(start, start + tile)
        x = hidden[tokens]
        labels = local_labels[tokens]
        logits = torch.mm(x, real_weight.T, out=buffer[: len(x)]).to(dtype)  # [tokens, real rows]
        is_local = (labels >= 0) & (labels < num_real)
        label_rows = labels.clamp(0, max(num_real - 1, 0))[:, None]

        largest = logits.amax(1) if num_real else logits.new_full((len(x),), -torch.inf)
        if is_shared:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        logits -= largest[:, None]
        if num_real:
            label_logits = logits.gather(1, label_rows)[:, 0].where(is_local, 0.0)
        else:
            label_logits = torch.zeros_like(largest)

        sums = torch.stack([label_logits, logits.exp_().sum(1)])
        if is_shared:
            dist.all_reduce(sums, group=group)
        losses = sums[1].log() - sums[0]
        yield _Tile(tokens, logits, sums[1], losses, label_rows, is_local)


class _TileGradients(NamedTuple):
    """The losses of a tile's tokens and their gradients, as far as this rank's rows go."""

    tokens: slice
    losses: Tensor
    """Without the tokens' weights: ``[tokens]``."""
    logits: Tensor | None
    """Gradients of the weighted losses, ``[tokens, real rows]`` in the dtype of the hidden states;
    None if nobody wants them. The next tile may reuse the memory."""


def _tile_gradients(
    hidden: Tensor,
    real_weight: Tensor,
    local_labels: Tensor,
    token_weights: Tensor,
    group: dist.ProcessGroup | None,
    tile_size: int,
    wants_gradients: bool,
) -> Iterator[_TileGradients]:
    """Yield losses and gradients of ``tile_size`` tokens after another, by torch's operations."""
    dtype = _accumulation_dtype(hidden)
    for tile in _tiles(hidden, real_weight, local_labels, group, dtype, tile_size):
        if not wants_gradients:
            yield _TileGradients(tile.tokens, tile.losses, None)
            continue
        # scale * (softmax - one_hot(label)), in the memory of the exponentials
        scale = token_weights[tile.tokens].to(dtype)
        grad_logits = tile.exponentials.mul_((scale / tile.sums)[:, None])
        if len(real_weight):
            grad_logits.scatter_add_(1, tile.label_rows, -(scale * tile.is_local)[:, None])
        yield _TileGradients(tile.tokens, tile.losses, grad_logits.to(hidden.dtype))


def _fused_tile_gradients(
    hidden: Tensor,
    real_weight: Tensor,
    local_labels: Tensor,
    token_weights: Tensor,
    group: dist.ProcessGroup | None,
    tile_size: int,
    wants_gradients: bool,
) -> Iterator[_TileGradients]:
    """Yield what :func:`_tile_gradients` does, by two kernels that leave logits in their dtype."""
    from .loss_triton import logits_to_gradients, row_statistics

    num_real = len(real_weight)
    buffer = hidden.new_empty(min(tile_size, len(hidden)), num_real)
    for start in range(0, len(hidden), tile_size):
        tokens = slice(start, start + tile_size)
        labels = local_labels[tokens]
        logits = torch.mm(hidden[tokens], real_weight.T, out=buffer[: len(labels)])
        largest, sums, label_logits = row_statistics(logits, labels)
        label_logits -= largest
        if group is not None and group.size() > 1:
            own_largest = largest.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            is_local = (labels >= 0) & (labels < num_real)
            from_largest = own_largest - largest
            totals = torch.stack(
                [(label_logits + from_largest).where(is_local, 0.0), sums * from_largest.exp()]
            )
            dist.all_reduce(totals, group=group)
            label_logits, sums = totals
        losses = sums.log() - label_logits
        if wants_gradients:
            scale = token_weights[tokens].float()
            logits_to_gradients(logits, labels, largest, sums, scale)
        yield _TileGradients(tokens, losses, logits if wants_gradients else None)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, local_labels, token_weights, group, num_real, tile_size):
        dtype = _accumulation_dtype(hidden)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if want_weight else None
        total = hidden.new_zeros((), dtype=dtype)
        real_weight = weight[:num_real]
        tiles = (_fused_tile_gradients if has_kernels(hidden) else _tile_gradients)(
            hidden,
            real_weight,
            local_labels,
            token_weights,
            group,
            tile_size,
            want_hidden or want_weight,
        )
        for tile in tiles:
            total += (token_weights[tile.tokens].to(dtype) * tile.losses).sum()
            if tile.logits is None:
                continue
            if grad_hidden is not None:
                torch.mm(tile.logits, real_weight, out=grad_hidden[tile.tokens])
            if grad_weight is None:
                continue
            x = hidden[tile.tokens]
            if grad_weight.dtype == hidden.dtype:
                grad_weight[:num_real].addmm_(tile.logits.T, x)
            else:
                grad_weight[:num_real] += tile.logits.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * upstream.to(grad_hidden.dtype)
        if grad_weight is not None:
            # Multiplied in fp32 and rounded by one kernel, without an fp32 product in between.
            rounded = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, upstream, out=rounded)
        return grad_hidden, grad_weight, None, None, None, None, None
