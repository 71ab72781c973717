"""The loss of a language model without its logits: a tile of tokens at a time, over a vocabulary that tensor-parallel ranks
share.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    tile: int = 1024,
) -> Tensor:
    """Sum of ``token_weights * -log softmax(hidden @ weight.T)[labels]``, in nats, with its gradients of ``hidden`` and
    ``weight``.

    The gradients are made in the forward pass, while a tile's logits are at hand, and scaled in the backward pass: the three
    matrix products of a plain loss, and no logits but those of one tile (the fused linear cross-entropy of Liger Kernel,
    arXiv 2410.10989).

    Args:
        hidden: ``[tokens, hidden]``, the same on every rank of ``group``; its gradient here is of this rank's part of the
            vocabulary.
        weight: this rank's rows ``[local vocabulary, hidden]``, those of all ranks one after another.
        labels: int64 ``[tokens]``, ids of the whole vocabulary.
        token_weights: ``[tokens]``; not differentiated.
        group: the ranks that share the vocabulary; None for one.
        vocab_size: rows of the whole vocabulary that are no padding; None for all.
        tile: tokens whose logits exist at a time.

    Returns:
        A scalar, fp32 (fp64 for fp64), the same on every rank of ``group``.
    """
    if (
        not torch.is_grad_enabled()
    ):  # autograd would still ask for the gradient of what has one otherwise
        hidden, weight = hidden.detach(), weight.detach()
    first, real = _part(weight, group, vocab_size)
    return _CrossEntropySum.apply(hidden, weight, labels - first, token_weights, group, real, tile)


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    tile: int = 1024,
) -> tuple[Tensor, Tensor]:
    """``-log softmax(hidden @ weight.T)[labels]`` of each token, in nats, and whether ``argmax`` says its label: ``[tokens]``.

    Without gradients; the arguments are those of :func:`cross_entropy_sum`.
    """
    first, real = _part(weight, group, vocab_size)
    found = []
    for each in _tiles(hidden, weight[:real], labels - first, group, _exact(hidden), tile):
        # Of several that are as likely the first one, over all ranks.
        last = torch.full_like(each.where[:, 0], torch.iinfo(torch.int64).max)
        said = (
            (each.exponentials.argmax(1) + first).where(each.exponentials.amax(1) == 1, last)
            if real
            else last
        )
        if group is not None and group.size() > 1:
            dist.all_reduce(said, dist.ReduceOp.MIN, group=group)
        found.append((each.losses, said == labels[each.part]))
    losses, likeliest = zip(*found, strict=True)
    return torch.cat(losses), torch.cat(likeliest)


def _part(
    weight: Tensor, group: dist.ProcessGroup | None, vocab_size: int | None
) -> tuple[int, int]:
    """Of the vocabulary this rank's first row, and how many of its rows are no padding."""
    local = weight.shape[0]
    first = local * (group.rank() if group else 0)
    return first, local if vocab_size is None else max(0, min(vocab_size - first, local))


def _exact(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class _Tile(NamedTuple):
    part: slice
    """Its tokens."""
    exponentials: Tensor
    """Of the logits less the largest of all ranks, ``[tokens, real]``; the next tile may take their memory."""
    sums: Tensor
    """Of the exponentials over the whole vocabulary, ``[tokens]``."""
    losses: Tensor
    where: Tensor
    """The row that is a label's, ``[tokens, 1]``, where it is ``mine``."""
    mine: Tensor


def _tiles(
    hidden: Tensor,
    rows: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup | None,
    exact: torch.dtype,
    size: int,
) -> Iterator[_Tile]:
    """The softmax of ``size`` tokens after another; ``labels`` count from this rank's first row."""
    real, shared = len(rows), group is not None and group.size() > 1
    buffer = hidden.new_empty(
        min(size, len(hidden)), real
    )  # of all tiles: new memory costs a CPU as much as the product
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        x = hidden[part]
        logits = torch.mm(x, rows.T, out=buffer[: len(x)]).to(exact)
        mine = (labels[part] >= 0) & (labels[part] < real)
        where = labels[part].clamp(0, max(real - 1, 0))[:, None]
        most = logits.amax(1) if real else logits.new_full((len(x),), -torch.inf)
        if shared:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        logits -= most[:, None]
        asked = logits.gather(1, where)[:, 0].where(mine, 0.0) if real else torch.zeros_like(most)
        sums = torch.stack([asked, logits.exp_().sum(1)])
        if shared:
            dist.all_reduce(sums, group=group)
        yield _Tile(part, logits, sums[1], sums[1].log() - sums[0], where, mine)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, group, real, tile_size):
        exact = _exact(hidden)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if want_weight else None
        total, rows = hidden.new_zeros((), dtype=exact), weight[:real]
        for tile in _tiles(hidden, rows, labels, group, exact, tile_size):
            x, scale = hidden[tile.part], token_weights[tile.part].to(exact)
            total += (scale * tile.losses).sum()
            if not (want_hidden or want_weight):
                continue
            gradient = tile.exponentials.mul_((scale / tile.sums)[:, None])
            if real:
                gradient.scatter_add_(1, tile.where, -(scale * tile.mine)[:, None])
            gradient = gradient.to(hidden.dtype)
            if want_hidden:
                torch.mm(gradient, rows, out=grad_hidden[tile.part])
            if want_weight and grad_weight.dtype == hidden.dtype:
                grad_weight[:real].addmm_(gradient.T, x)
            elif want_weight:
                grad_weight[:real] += gradient.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * upstream.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * upstream).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None
