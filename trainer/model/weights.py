"""Parameters by their global names, whatever rank holds which part: initial values, gathering, loading."""

import hashlib
import re
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.")
_OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


def global_parameters(model: GPTModel) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters by their names in the whole model: layers are numbered over all pipeline stages, experts over all
    expert-parallel ranks.

    The tied output matrix of a last stage has the embedding's name.
    """
    for name, parameter in model.named_parameters():
        if match := _LAYER.match(name):
            number = model.decoder.layers[int(match[1])].layer_number - 1
            name = f"decoder.layers.{number}.{_whole_experts(name[match.end() :], model.decoder.layers[int(match[1])])}"
        elif name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        yield name, parameter


def _whole_experts(name: str, layer: nn.Module) -> str:
    match = _EXPERT.match(name)
    if not match:
        return name
    number = layer.mlp.local_expert_indices[int(match[1])]
    return f"mlp.experts.local_experts.{number}.{name[match.end() :]}"


def is_second_copy(model: GPTModel, parameter: nn.Parameter) -> bool:
    """Whether it is a last stage's own copy of the tied embedding, which the first stage has as well."""
    tied = (
        model.post_process and not model.pre_process and model.share_embeddings_and_output_weights
    )
    return tied and parameter is model.output_layer.weight


def initialise(model: GPTModel, seed: int, std: float, num_layers: int) -> None:
    """Set every parameter to a pure function of (seed, its global name): the same model on any number of ranks.

    Those that say what they begin with (``initial``) do so; other vectors (norms) are ones, matrices normal with ``std``,
    output projections with ``std / sqrt(2 num_layers)`` (GPT-2).
    """
    for name, parameter in global_parameters(model):
        shape = list(parameter.shape)
        if is_split(parameter):
            shape[parameter.partition_dim] *= split_ranks(parameter)[1]
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        if hasattr(parameter, "initial"):
            whole = parameter.initial(shape, generator)
        elif len(shape) == 1:
            whole = torch.ones(shape)
        else:
            scale = std / (2 * num_layers) ** 0.5 if name.endswith(_OUTPUT_PROJECTIONS) else std
            whole = torch.randn(shape, generator=generator) * scale
        _load(parameter, whole)


def gather(
    model: GPTModel, of: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.detach()
) -> dict[str, Tensor] | None:
    """Whole tensors by global name, on the CPU of global rank 0 and None elsewhere.

    ``of`` picks what is gathered: the parameter itself, or its gradient.
    """
    group, here = parallel_state.get_tensor_model_parallel_group(), {}
    for name, parameter in global_parameters(model):
        part = of(parameter).contiguous()
        if is_split(parameter) and split_ranks(parameter)[1] > 1:
            parts = [torch.empty_like(part) for _ in range(group.size())]
            dist.all_gather(parts, part, group=group)
            part = _unsplit(parts, parameter)
        here[name] = part.cpu().clone()
    experts = {name: whole for name, whole in here.items() if ".mlp.experts." in name}
    here |= _of_all(experts, parallel_state.get_expert_model_parallel_group())
    here = _of_all(here, parallel_state.get_pipeline_model_parallel_group())
    return here if dist.get_rank() == 0 else None


def _of_all(here: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    parts: list = [here] * group.size()
    if len(parts) > 1:
        dist.all_gather_object(parts, here, group=group)
    return {name: whole for part in parts for name, whole in part.items()}


@torch.no_grad()
def _load(parameter: nn.Parameter, whole: Tensor) -> None:
    if is_split(parameter):
        rank, size = split_ranks(parameter)
        # A partition stride of 2 is [gate; up] in one matrix: a rank holds its part of each.
        slabs = whole.chunk(parameter.partition_stride, parameter.partition_dim)
        whole = torch.cat(
            [slab.chunk(size, parameter.partition_dim)[rank] for slab in slabs],
            parameter.partition_dim,
        )
    parameter.copy_(whole)


def _unsplit(parts: list[Tensor], parameter: nn.Parameter) -> Tensor:
    dim = parameter.partition_dim
    slabs = zip(*(part.chunk(parameter.partition_stride, dim) for part in parts), strict=True)
    return torch.cat([piece for slab in slabs for piece in slab], dim)


def local_shape(parameter: nn.Parameter) -> torch.Size:
    """Of this tensor-parallel rank's slice; ZeRO-3 leaves nothing of it in the parameter itself."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_split(parameter: nn.Parameter) -> bool:
    """Whether each tensor-parallel rank holds a slice of it."""
    return getattr(parameter, "tensor_model_parallel", False)


def split_ranks(parameter: nn.Parameter) -> tuple[int, int]:
    """This rank among those that hold slices of it, and how many these are: the experts of a rank may be whole."""
    if getattr(parameter, "allreduce", True):
        return (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
    return (
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
