"""DeepSpeed's configuration, from a recipe."""

import torch

from ..recipe.engine_config import DeepSpeedConfig
from ..recipe.schema import Recipe


def deepspeed_config(recipe: Recipe, engine: DeepSpeedConfig, dtype: torch.dtype) -> dict:
    """Return DeepSpeed's configuration: the recipe's keys, and those that ``engine`` passes on."""
    training = recipe.training
    optimizer = recipe.optimizer
    num_microbatches = training.global_batch_size // training.micro_batch_size
    adam = {
        "lr": optimizer.lr,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "torch_adam": not engine.offloads_optimizer,
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
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        # A constant factor of the loss, as it believes: the engine sets it before each step.
        "fp16": {"enabled": dtype == torch.float16, "loss_scale": 1.0},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }
