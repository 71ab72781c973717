"""The door to Megatron-core: each name of it that longspan uses, imported here and nowhere else.

Megatron-core takes optimizers and kernels from Transformer Engine or Apex whenever these can be
imported, as they can in NVIDIA's images. The layers here use none of them, their optimizers keep
another state, and their sums are in another order: they are hidden from Megatron-core while it is
imported, so that runs give the same bits in any image, and are left alone for everybody else.

Two more things would cost every start seconds for nothing: wandb, which its inference imports, and
torch's compiler, which is loaded as soon as a function is decorated with ``torch.compile``.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module
from typing import Any

import torch

from .errors import UserError
from .versions import TRAINING, require_supported

_HIDDEN = (
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "amp_C",
    "fused_weight_gradient_mlp_cuda",
    "wandb",
)
"""Modules of Transformer Engine and of Apex, and what is slow to import and not used."""


@contextmanager
def _hidden(packages: tuple[str, ...]) -> Iterator[None]:
    """Let imports of these packages fail as if they were not installed."""
    loaded = {
        name: module for name, module in sys.modules.items() if name.partition(".")[0] in packages
    }
    blocked = {*packages, *loaded}
    for name in blocked:
        # Python's way to say that there is no such module.
        sys.modules[name] = None  # type: ignore[assignment]  # typeshed knows no None there
    try:
        yield
    finally:
        for name in blocked:
            del sys.modules[name]
        sys.modules.update(loaded)


@contextmanager
def _compiled_when_called() -> Iterator[None]:
    """Let functions decorated with ``torch.compile`` be compiled at their first call."""
    compile_now = torch.compile

    def compile_later(function: Callable | None = None, **options: Any) -> Callable:
        if function is None:
            return partial(compile_later, **options)
        compiled: list[Callable] = []

        @wraps(function)
        def call(*args, **kwargs):
            if torch.compiler.is_compiling():  # as a part of another function
                return function(*args, **kwargs)
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*args, **kwargs)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


require_supported(*TRAINING)

with _hidden(_HIDDEN), _compiled_when_called():
    from megatron.core import optimizer, parallel_state
    from megatron.core.datasets.indexed_dataset import (
        DType,
        IndexedDataset,
        IndexedDatasetBuilder,
    )
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.common.embeddings.language_model_embedding import (
        LanguageModelEmbedding,
    )
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer import (
        MegatronOptimizer,
        OptimizerConfig,
        clip_grads,
        get_megatron_optimizer,
    )
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        get_cuda_rng_tracker,
        model_parallel_cuda_manual_seed,
    )
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
    from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
    from megatron.core.transformer import ModuleSpec, TransformerConfig
    from megatron.core.transformer.enums import ModelType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import Float16Module, MegatronModule
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.transformer_block import (
        TransformerBlock,
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    # Megatron's schedules would import it in the middle of a step.
    import_module("megatron.core.transformer.multi_token_prediction")


def _l2_norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], *_: bool
) -> tuple[torch.Tensor, None]:
    """Return the norm of all tensors together, ``[1]``; as Apex's function of this name is called.

    Megatron-core's own waits for the GPU once for each tensor.
    """
    norms = torch._foreach_norm(tensor_lists[0])
    return torch.stack(norms).norm().view(1), None


def _scale(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], factor: float
) -> None:
    """Multiply the first list of tensors by a factor into the second, which is the same list."""
    torch._foreach_mul_(tensor_lists[1], factor)


# What Megatron-core takes from Transformer Engine or Apex where it finds them.
clip_grads.l2_norm_impl = _l2_norm
clip_grads.multi_tensor_scale_impl = _scale

if not hasattr(moe_utils, "te_general_gemm"):
    # Megatron-core 0.16.1 reads it, and defines it only with Transformer Engine.
    moe_utils.te_general_gemm = None


def require_own_optimizer() -> None:
    """Raise UserError if Megatron-core would take Adam from Transformer Engine or Apex."""
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        raise UserError(
            "megatron.core: was imported before longspan, and took its optimizer from Transformer "
            "Engine or Apex; import longspan.trainer.megatron_core first"
        )


__all__ = [
    "MLP",
    "ColumnParallelLinear",
    "DType",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "Float16Module",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "LanguageModelEmbedding",
    "LanguageModule",
    "MLPSubmodules",
    "MegatronModule",
    "MegatronOptimizer",
    "MoEAuxLossAutoScaler",
    "MoELayer",
    "MoESubmodules",
    "ModelType",
    "ModuleSpec",
    "OptimizerConfig",
    "ProcessGroupCollection",
    "RowParallelLinear",
    "SequentialMLP",
    "SharedExpertMLP",
    "TopKRouter",
    "TransformerBlock",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "clip_grad_by_total_norm_fp32",
    "copy_to_tensor_model_parallel_region",
    "finalize_model_grads",
    "gather_from_sequence_parallel_region",
    "get_cuda_rng_tracker",
    "get_forward_backward_func",
    "get_megatron_optimizer",
    "get_num_layers_to_build",
    "get_transformer_layer_offset",
    "megatron_random",
    "model_parallel_cuda_manual_seed",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "require_own_optimizer",
    "set_tensor_model_parallel_attributes",
]
