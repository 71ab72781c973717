"""The loss of a language model without its logits: a tile of tokens at a time, over a vocabulary that tensor-parallel ranks
share.
"""

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
    if not torch.is_grad_enabled():  # autograd would still ask for the gradient of what has one otherwise
        hidden, weight = hidden.detach(), weight.detach()
    local, rank = weight.shape[0], group.rank() if group else 0
    real = local if vocab_size is None else max(0, min(vocab_size - rank * local, local))
    return _CrossEntropySum.apply(hidden, weight, labels - rank * local, token_weights, group, real, tile)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, group, real, tile):
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if want_weight else None
        total, rows = hidden.new_zeros((), dtype=exact), weight[:real]
        buffer = hidden.new_empty(min(tile, len(hidden)), real)  # of all tiles: new memory costs a CPU as much as the product
        for start in range(0, len(hidden), tile):
            part = slice(start, start + tile)
            x, scale = hidden[part], token_weights[part].to(exact)
            logits = torch.mm(x, rows.T, out=buffer[: len(x)]).to(exact)
            mine = (labels[part] >= 0) & (labels[part] < real)
            where = labels[part].clamp(0, max(real - 1, 0))[:, None]
            most = logits.amax(1) if real else logits.new_full((len(x),), -torch.inf)
            if group and group.size() > 1:
                dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
            logits -= most[:, None]
            asked = logits.gather(1, where)[:, 0].where(mine, 0.0) if real else torch.zeros_like(most)
            sums = torch.stack([asked, logits.exp_().sum(1)])
            if group and group.size() > 1:
                dist.all_reduce(sums, group=group)
            total += (scale * (sums[1].log() - sums[0])).sum()
            if not (want_hidden or want_weight):
                continue
            gradient = logits.mul_((scale / sums[1])[:, None])
            if real:
                gradient.scatter_add_(1, where, -(scale * mine)[:, None])
            gradient = gradient.to(hidden.dtype)
            if want_hidden:
                torch.mm(gradient, rows, out=grad_hidden[part])
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
