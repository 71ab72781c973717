"""Parameters by their global names, whichever rank holds which part: initial values, gathering,
loading.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..megatron_core import parallel_state
from .model import HybridModel

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.")
_OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


def global_parameters(model: HybridModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield this rank's parameters with their names in the whole model.

    Layers are numbered over all pipeline stages, experts over all expert-parallel ranks. The tied
    output matrix of a last stage has the embedding's name.
    """
    for name, parameter in model.named_parameters():
        if match := _LAYER.match(name):
            layer = model.decoder.layers[int(match[1])]
            inner_name = _global_expert_name(name[match.end() :], layer)
            name = f"decoder.layers.{layer.layer_number - 1}.{inner_name}"
        elif name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        yield name, parameter


def _global_expert_name(name: str, layer: Any) -> str:
    """Return a parameter's name within a layer, with the global number of its expert, if any."""
    match = _EXPERT.match(name)
    if not match:
        return name
    number = layer.mlp.local_expert_indices[int(match[1])]
    return f"mlp.experts.local_experts.{number}.{name[match.end() :]}"


def is_second_copy(model: HybridModel, parameter: nn.Parameter) -> bool:
    """Return whether it is a last stage's own copy of the tied embedding, which the first stage has
    as well.
    """
    has_copy = model.post_process and not model.pre_process
    if not (has_copy and model.share_embeddings_and_output_weights):
        return False
    return parameter is model.output_layer.weight


def initialize(model: HybridModel, seed: int, std: float, num_layers: int) -> None:
    """Set every parameter to a pure function of (seed, its global name): the same model on any
    number of ranks.

    Parameters with an attribute ``initial`` begin as it says; other vectors (norms) are ones,
    matrices are normal with ``std``, output projections with ``std / sqrt(2 num_layers)`` (GPT-2).
    """
    for name, parameter in global_parameters(model):
        shape = list(parameter.shape)
        if split := _split_of(parameter):
            shape[split.dim] *= split.num_parts
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

        initial = getattr(parameter, "initial", None)
        if initial is not None:
            whole = initial(shape, generator)
        elif len(shape) == 1:
            whole = torch.ones(shape)
        else:
            is_output = name.endswith(_OUTPUT_PROJECTIONS)
            scale = std / (2 * num_layers) ** 0.5 if is_output else std
            whole = torch.randn(shape, generator=generator) * scale
        _load(parameter, whole)


def _value(parameter: nn.Parameter) -> Tensor:
    return parameter.detach()


def gather(
    model: HybridModel, tensor_of: Callable[[nn.Parameter], Tensor] = _value
) -> dict[str, Tensor] | None:
    """Return whole tensors by global name, on the CPU of global rank 0 and None elsewhere.

    ``tensor_of`` picks what is gathered: the parameter itself, or its gradient.
    """
    tp_group = parallel_state.get_tensor_model_parallel_group()
    tensors = {}
    for name, parameter in global_parameters(model):
        tensor = tensor_of(parameter).contiguous()
        split = _split_of(parameter)
        if split and split.num_parts > 1:
            parts = [torch.empty_like(tensor) for _ in range(tp_group.size())]
            dist.all_gather(parts, tensor, group=tp_group)
            tensor = _joined(parts, split)
        tensors[name] = tensor.cpu().clone()

    experts = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." in name}
    tensors |= _from_all(experts, parallel_state.get_expert_model_parallel_group())
    tensors = _from_all(tensors, parallel_state.get_pipeline_model_parallel_group())
    return tensors if dist.get_rank() == 0 else None


def _from_all(tensors: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Return the tensors of all ranks of the group together."""
    if group.size() == 1:
        return tensors
    parts: list = [None] * group.size()
    dist.all_gather_object(parts, tensors, group=group)
    return {name: tensor for part in parts for name, tensor in part.items()}


@torch.no_grad()
def _load(parameter: nn.Parameter, whole: Tensor) -> None:
    """Set this rank's slice of a whole tensor."""
    if split := _split_of(parameter):
        slabs = whole.chunk(split.num_slabs, split.dim)
        parts = [slab.chunk(split.num_parts, split.dim)[split.part] for slab in slabs]
        whole = torch.cat(parts, split.dim)
    parameter.copy_(whole)


class _Split(NamedTuple):
    """How tensor-parallel ranks share a parameter, from Megatron's marks on it."""

    dim: int
    num_slabs: int
    """2 for [gate; up] in one matrix, where a rank holds its part of each; else 1."""
    part: int
    """Which part this rank holds."""
    num_parts: int


def _split_of(parameter: Any) -> _Split | None:
    if not is_split(parameter):
        return None
    return _Split(parameter.partition_dim, parameter.partition_stride, *split_ranks(parameter))


def _joined(parts: list[Tensor], split: _Split) -> Tensor:
    """Return the whole tensor of which every rank holds a part."""
    chunks_of_parts = [part.chunk(split.num_slabs, split.dim) for part in parts]
    slabs = zip(*chunks_of_parts, strict=True)
    return torch.cat([chunk for slab in slabs for chunk in slab], split.dim)


def local_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of this tensor-parallel rank's slice; under ZeRO-3 the parameter itself is
    empty.
    """
    return getattr(parameter, "ds_shape", parameter.shape)


def is_split(parameter: nn.Parameter) -> bool:
    """Return whether each tensor-parallel rank holds a slice of it."""
    return getattr(parameter, "tensor_model_parallel", False)


def split_ranks(parameter: nn.Parameter) -> tuple[int, int]:
    """Return this rank among those that hold slices of the parameter, and how many these are: the
    experts of a rank may be whole.
    """
    if getattr(parameter, "allreduce", True):
        return (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
    return (
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
