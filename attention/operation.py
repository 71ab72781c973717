"""What surrounds a call and must not change it: autocast, and torch.compile's tracing."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_DEVICE_TYPES = ("cpu", "cuda")
"""Whose autocast is switched off."""


def operation(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Make a function compute the same under autocast, and run under torch.compile.

    Autocast would round the inputs of some products inside to bf16, and return fp32 that is not.
    The compiler does not trace the function, whose plans are numpy and Python; what is around it is
    compiled.
    """
    function = without_autocast(function)

    @wraps(function)
    def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return call


def without_autocast(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Make a function compute the same under autocast.

    Also for what is called in backward, which runs under the autocast of its caller.
    """

    @wraps(function)
    def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        if not any(map(torch.is_autocast_enabled, _DEVICE_TYPES)):
            return function(*arguments, **options)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*arguments, **options)

    return call


def recomputed(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call ``function(*arguments)``; its intermediate results are computed again in backward.

    Both times without autocast, which would otherwise reach the formulas that autograd derives.

    Args:
        function: returns a tensor or a tuple of tensors, and sees no tensor that requires a
            gradient but its arguments.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    return _Recomputed.apply(function, *arguments)


class _Recomputed(torch.autograd.Function):
    """What `torch.utils.checkpoint` does.

    Without its second of imports, and a fifth of the forward time that its hooks take.
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, function: Callable[..., Any], *arguments: Any) -> Any:
        ctx.function = function
        ctx.save_for_backward(*(x for x in arguments if isinstance(x, Tensor)))
        # For each argument None if it is a saved tensor, else a tuple with the argument itself.
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in arguments]
        return function(*arguments)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        arguments = [next(saved).detach() if other is None else other[0] for other in ctx.others]
        inputs = [
            x.requires_grad_()
            for x, needs_grad in zip(arguments, ctx.needs_input_grad[1:], strict=True)
            if needs_grad
        ]
        with torch.enable_grad():
            results = ctx.function(*arguments)
        if isinstance(results, Tensor):
            results = (results,)
        # A result without a graph: the last state does not depend on the queries.
        used = [pair for pair in zip(results, gradients, strict=True) if pair[0].requires_grad]
        if not used:
            return None, *(None for _ in arguments)
        outputs, upstream = zip(*used, strict=True)
        input_gradients = iter(torch.autograd.grad(outputs, inputs, upstream, allow_unused=True))
        return None, *(
            next(input_gradients) if needs_grad else None for needs_grad in ctx.needs_input_grad[1:]
        )
