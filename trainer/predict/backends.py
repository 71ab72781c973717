"""Which backend every block of a recipe gets on a GPU, here or not, and why no faster one."""

from functools import partial
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...attention.gpu import assumed_gpu
from ..layers.base import GPUCall
from ..recipe.schema import Recipe


class BlockBackend(NamedTuple):
    """A block of the stack, what computes its operation, and why nothing faster does."""

    block: str
    backend: str
    is_slow: bool
    reasons: str


def block_backends(recipe: Recipe, capability: int) -> list[BlockBackend]:
    """Return what every block's operation is computed by, as the operations choose it themselves.

    Packages are those of this machine.

    Args:
        capability: compute capability of the GPU, 90 for 9.0; 0 for one of AMD's.

    Returns:
        For each block in the order of the stack one, or several if its calls differ; none for a
        block whose mixer has no operation with backends.
    """
    parallel = recipe.parallel
    with FakeTensorMode(), assumed_gpu(capability):
        call = GPUCall(
            empty=partial(torch.empty, device="cuda"),
            batch=recipe.training.micro_batch_size,
            tokens=recipe.training.seq_length // parallel.cp,
            dtype=getattr(torch, recipe.training.dtype_on(capability)),
            tensor_ranks=parallel.tp,
            context_ranks=parallel.cp,
        )
        backends = [
            BlockBackend(name, choice.backend, choice.is_slow, choice.reasons)
            for name in dict.fromkeys(recipe.model.stack_names)
            for choice in recipe.model.layers.blocks[name].backend_choices(recipe.model, call)
        ]
    return list(dict.fromkeys(backends))


def backend_lines(recipe: Recipe, capability: int) -> list[str]:
    """Return what to say of :func:`block_backends`: a line, and a warning for each slow one."""
    backends = block_backends(recipe, capability)
    fast = [
        f"{each.block} {each.backend}{f' ({each.reasons})' if each.reasons else ''}"
        for each in backends
        if not each.is_slow
    ]
    warnings = [
        f"warning: {each.block} is computed by torch's formulas, several times slower: "
        f"{each.reasons}"
        for each in backends
        if each.is_slow
    ]
    return [*([f"backends: {'; '.join(fast)}"] if fast else []), *warnings]
