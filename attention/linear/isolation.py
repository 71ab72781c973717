"""Keeps NaN and infinity in the document that they come from.

The chunks of the torch backend multiply tokens of several documents at once, with factors of 0
across their edges, and 0 * NaN is NaN. So what is not finite never enters: its numbers become 0,
and what depends on them becomes NaN afterwards, in the output and in the gradients. What other
documents get stays the same to the bit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arguments import accumulation_dtype
from ..documents import document_starts


def forward_by_document(
    forward: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    documents: Tensor,
) -> tuple[Tensor, Tensor]:
    """Call ``forward``, that of a backend, so that documents have nothing to do with each other."""
    isolation = _Isolation(documents)
    q, k, v, decay, beta, state = _Enter.apply(isolation, q, k, v, decay, beta, state)
    out, last_state = forward(q, k, v, decay, beta, scale, state, documents)
    return _Leave.apply(isolation, out, last_state)


class _LostResults(NamedTuple):
    """Results that depend on something that is not finite."""

    out: Tensor
    """bool ``[batch, time, heads]``."""
    last_state: Tensor
    """bool ``[batch, heads]``."""


class _LostGradients(NamedTuple):
    """Tokens whose gradients depend on something that is not finite: ``[batch, time, heads]``."""

    reading: Tensor
    """Those of ``q``."""
    writing: Tensor
    """Those of ``k``, ``v``, ``beta`` and ``decay``; of the first token also that of the state."""


class _Isolation:
    """What :class:`_Enter` and :class:`_Leave` say to each other."""

    def __init__(self, documents: Tensor):
        self.documents = documents
        self.lost_results: _LostResults | None = None
        self.lost_gradients: _LostGradients | None = None

    def at_or_after(self, tokens: Tensor) -> Tensor:
        """Return the tokens at or after one of ``tokens`` in its document, for each head."""
        return _at_or_after(tokens, self.documents)

    def at_or_before(self, tokens: Tensor) -> Tensor:
        """Return the tokens at or before one of ``tokens`` in its document, for each head."""
        return _at_or_after(tokens.flip(1), self.documents.flip(1)).flip(1)


def _at_or_after(tokens: Tensor, documents: Tensor) -> Tensor:
    """Return bool ``[batch, time, heads]`` like ``tokens``; ids may also descend."""
    document_start = document_starts(documents)[..., None].expand_as(tokens)

    count = tokens.long().cumsum(1)
    count_before_document = (count - tokens.long()).gather(1, document_start)
    return count > count_before_document


class _Enter(torch.autograd.Function):
    """Zeros for what is not finite; in backward NaN for the gradients that depend on it."""

    @staticmethod
    def forward(
        ctx: Any,
        isolation: _Isolation,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        beta: Tensor | None,
        state: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.isolation = isolation
        ctx.set_materialize_grads(False)
        of_tokens = decay is not None and decay.ndim > 1
        if not _all_finite(q, k, v, decay if of_tokens else None, beta, state):
            heads = v.shape[2]
            spoils_state = _any_of_head(~k.isfinite(), heads) | _any_of_head(~v.isfinite(), heads)
            if decay is not None and of_tokens:
                is_decay = decay < torch.inf  # minus infinity leaves nothing, and is one
                spoils_state |= _any_of_head(~is_decay, heads)
                decay = decay.where(is_decay, 0.0)
            if beta is not None:
                spoils_state |= ~beta.isfinite()
                beta = _finite(beta)
            spoils_state[:, 0] |= (~state.isfinite()).flatten(2).any(-1)

            lost_states = isolation.at_or_after(spoils_state)
            lost_out = lost_states | _any_of_head(~q.isfinite(), heads)
            isolation.lost_results = _LostResults(lost_out, lost_states[:, -1])
            q, k, v, state = map(_finite, (q, k, v, state))

        results = (q, k, v, decay, beta, state)
        ctx.mark_non_differentiable(
            *(
                x
                for x, needs_grad in zip(results, ctx.needs_input_grad[1:], strict=True)
                if x is not None and not needs_grad
            )
        )
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        lost: _LostGradients | None = ctx.isolation.lost_gradients
        if lost is None:
            return None, *gradients
        dq, *of_written, dstate = gradients  # k, v, decay, beta
        if dstate is not None:
            dstate = dstate.masked_fill(lost.writing[:, 0, :, None, None], torch.nan)
        return (
            None,
            _with_nan(dq, lost.reading),
            *(_with_nan(gradient, lost.writing) for gradient in of_written),
            dstate,
        )


class _Leave(torch.autograd.Function):
    """NaN for what depends on something not finite; in backward zeros for upstream gradients."""

    @staticmethod
    def forward(
        ctx: Any, isolation: _Isolation, out: Tensor, last_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.isolation = isolation
        ctx.heads = out.shape[2]
        ctx.set_materialize_grads(False)
        lost = isolation.lost_results
        if lost is None:
            return out, last_state
        return (
            out.masked_fill(lost.out[..., None], torch.nan),
            last_state.masked_fill(lost.last_state[..., None, None], torch.nan),
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_state: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        isolation: _Isolation = ctx.isolation
        isolation.lost_gradients = None
        lost = isolation.lost_results
        if lost is None and _all_finite(grad_out, grad_state):
            return None, grad_out, grad_state

        documents = isolation.documents
        reading = torch.zeros(
            *documents.shape, ctx.heads, dtype=torch.bool, device=documents.device
        )
        if grad_out is not None:
            reading = (~grad_out.isfinite()).any(-1)
            if lost is not None:
                reading |= lost.out
            grad_out = grad_out.masked_fill(reading[..., None], 0.0)
        written = reading.clone()
        if grad_state is not None:
            lost_state = (~grad_state.isfinite()).flatten(2).any(-1)
            if lost is not None:
                lost_state |= lost.last_state
            written[:, -1] |= lost_state
            grad_state = grad_state.masked_fill(lost_state[..., None, None], 0.0)
        isolation.lost_gradients = _LostGradients(reading, isolation.at_or_before(written))
        return None, grad_out, grad_state


def _all_finite(*tensors: Tensor | None) -> bool:
    """Return whether all numbers are finite; False also if their sum overflows."""
    sums = [x.sum(dtype=accumulation_dtype(x)).double() for x in tensors if x is not None]
    return bool(torch.stack(sums).isfinite().all())


def _finite(x: Tensor) -> Tensor:
    return x.where(x.isfinite(), 0.0)


def _any_of_head(x: Tensor, heads: int) -> Tensor:
    """Turn bool ``[batch, time, heads or key heads(, dim)]`` into ``[batch, time, heads]``."""
    if x.ndim == 4:
        x = x.any(-1)
    return x.repeat_interleave(heads // x.shape[2], 2)


def _with_nan(gradient: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Return a gradient with NaN for ``tokens``, bool ``[batch, time, heads]``.

    It is ``[batch, time, heads or key heads(, dim)]``, or ``[heads]`` for all tokens.
    """
    if gradient is None:
        return None
    if gradient.ndim == 1:
        return gradient.masked_fill(tokens.flatten(0, 1).any(0), torch.nan)
    mask = tokens.unflatten(2, (gradient.shape[2], -1)).any(-1)
    if gradient.ndim == 4:
        mask = mask[..., None]
    return gradient.masked_fill(mask, torch.nan)
