"""What DeepSpeed is told of a recipe. Without torch: conflicts are found before any process starts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import suggest

if TYPE_CHECKING:
    from ..recipe.schema import DeepSpeedConfig, Recipe

_PASSED_ON = (
    "aio",
    "communication_data_type",
    "gradient_predivide_factor",
    "prescale_gradients",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
_ZERO_PASSED_ON = (  # all that leaves parameters, gradients and moments where the checkpoints look for them
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
)
_OURS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "lr_scheduler",
    "bf16": "training.dtype",
    "bfloat16": "training.dtype",
    "fp16": "training.dtype",
    "amp": "training.dtype",
    "data_types": "training.dtype",
    "activation_checkpointing": "memory.recompute",
    "tensor_parallel": "parallel.tp",
    "sequence_parallel_size": "parallel.cp",
    "pipeline": "parallel.pp",
    "wandb": "metrics.wandb",
    "checkpoint": "checkpoint",
    "data_efficiency": "data",
    "curriculum_learning": "data",
}


def deepspeed_problems(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    """(key, reason and fix) of what DeepSpeed cannot do, and of keys that it and the recipe both claim."""
    engine, parallel = recipe.engine, recipe.parallel
    if engine.name != "deepspeed":
        return
    if parallel.pp > 1:
        yield (
            "parallel.pp",
            f"{parallel.pp} needs engine megatron: DeepSpeed's pipeline takes other models; use tp, cp or ZeRO",
        )
    if engine.zero_stage == 0 and recipe.training.dtype != "float32":
        yield (
            "engine.zero_stage",
            "0 adds up gradients in the weights' dtype; use 1, or set training.dtype to float32",
        )
    for key in engine.config:
        if key in _OURS:
            yield f"engine.config.{key}", f"is {_OURS[key]} of the recipe; remove it"
        elif key not in _PASSED_ON:
            yield (
                f"engine.config.{key}",
                f"unknown{suggest(key, list(_PASSED_ON))}; passed on are {', '.join(_PASSED_ON)}",
            )
    zero = engine.config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield "engine.config.zero_optimization", f"must be a section, got {zero!r}"
        return
    for key in zero:
        if key == "stage":
            yield (
                "engine.config.zero_optimization.stage",
                "is engine.zero_stage of the recipe; remove it",
            )
        elif key not in _ZERO_PASSED_ON:
            known = ", ".join(_ZERO_PASSED_ON)
            reason = f"is not passed on{suggest(key, list(_ZERO_PASSED_ON))}; passed on are {known}"
            yield f"engine.config.zero_optimization.{key}", reason
    for key, stages in {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}.items():
        offload = zero.get(key)
        if offload is not None and engine.zero_stage not in stages:
            reason = f"needs engine.zero_stage {' or '.join(map(str, stages))}, it is {engine.zero_stage}"
            yield f"engine.config.zero_optimization.{key}", reason
        elif isinstance(offload, dict) and offload.get("device") == "nvme":
            reason = "nvme: the state could not be put into checkpoints; use cpu"
            yield f"engine.config.zero_optimization.{key}.device", reason


def offloads(recipe: "Recipe", what: str = "offload_optimizer") -> bool:
    """Whether Adam runs on the CPU, or with ``offload_param`` weights wait there."""
    if recipe.engine.name != "deepspeed":
        return False
    offload = recipe.engine.config.get("zero_optimization", {}).get(what) or {}
    return offload.get("device", "none") != "none"


def deepspeed_config(recipe: "Recipe", engine: "DeepSpeedConfig", bf16: bool) -> dict:
    """Return DeepSpeed's configuration: the recipe's keys, and those that ``engine`` passes on."""
    training = recipe.training
    optimizer = recipe.optimizer
    num_microbatches = training.global_batch_size // training.micro_batch_size
    adam = {
        "lr": optimizer.lr,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "torch_adam": not offloads(recipe),
    }
    passed_on = dict(engine.config)
    zero = {"stage": engine.zero_stage, **passed_on.pop("zero_optimization", {})}
    return {
        "steps_per_print": None,  # the loop prints
        **passed_on,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": num_microbatches // recipe.data_parallel,
        # Under ZeRO 0 the engine clips by itself.
        "gradient_clipping": training.max_grad_norm if engine.zero_stage else 0.0,
        "optimizer": {"type": "AdamW", "params": adam},
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }
