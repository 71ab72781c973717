"""Which backend every block of a recipe gets on a GPU, here or not, and why no faster one."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...attention.gpu import assumed_gpu
from ..layers.base import Block, GPUCall
from ..layers.registry import KINDS
from ..recipe.schema import LayersConfig, ModelConfig, Recipe, auto_dtype


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
    call = GPUCall(
        empty=partial(torch.empty, device="cuda"),
        batch=recipe.training.micro_batch_size,
        tokens=recipe.training.seq_length // parallel.cp,
        dtype=getattr(torch, recipe.training.dtype_on(capability)),
        tensor_ranks=parallel.tp,
        context_ranks=parallel.cp,
    )
    blocks = {name: recipe.model.layers.blocks[name] for name in recipe.model.stack_names}
    return _backends(blocks, recipe.model, call, capability)


def mixer_backends(capability: int) -> list[BlockBackend]:
    """Return the same for every kind of mixer, with heads of 128 dims and its own defaults."""
    needed: dict[str, dict[str, Any]] = {
        "window": {"window": 1024},
        "streaming": {"window": 1024},
        "pattern": {"pattern": "S2(64, 16, 16) | Sinks(4)"},
    }
    names = [kind.kind() for kind in KINDS]
    blocks: dict[str, Block] = {
        name: kind.model_validate({"mixer": name, **needed.get(name, {})})
        for name, kind in zip(names, KINDS, strict=True)
    }
    model = ModelConfig(
        hidden_size=2048,
        num_hidden_layers=len(blocks),
        num_attention_heads=16,
        intermediate_size=8192,
        layers=LayersConfig(blocks=blocks, pattern=[*blocks]),
    )
    call = GPUCall(
        empty=partial(torch.empty, device="cuda"),
        batch=1,
        tokens=8192,
        dtype=getattr(torch, auto_dtype(capability)),
        tensor_ranks=1,
        context_ranks=1,
    )
    return _backends(blocks, model, call, capability)


def _backends(
    blocks: dict[str, Block], model: ModelConfig, call: GPUCall, capability: int
) -> list[BlockBackend]:
    with FakeTensorMode(), assumed_gpu(capability):
        backends = [
            BlockBackend(name, choice.backend, choice.is_slow, choice.reasons)
            for name, block in blocks.items()
            for choice in block.backend_choices(model, call)
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
