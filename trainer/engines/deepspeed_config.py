"""DeepSpeed's configuration, from a recipe."""

from ..recipe.engine_config import DeepSpeedConfig
from ..recipe.schema import Recipe


def deepspeed_config(recipe: Recipe, bf16: bool) -> dict:
    """DeepSpeed's configuration: what the recipe says of it, and what it passes on."""
    training, engine, chosen = recipe.training, recipe.engine, recipe.optimizer
    assert isinstance(engine, DeepSpeedConfig)
    adam = {
        "lr": chosen.lr,
        "betas": list(chosen.betas),
        "eps": chosen.eps,
        "weight_decay": chosen.weight_decay,
    }
    passed = dict(engine.config)
    zero = {"stage": engine.zero_stage, **passed.pop("zero_optimization", {})}
    return {
        "steps_per_print": None,  # the loop prints
        **passed,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size
        // training.micro_batch_size
        // recipe.data_parallel,
        "gradient_clipping": training.max_grad_norm if engine.zero_stage else 0.0,
        "optimizer": {
            "type": "AdamW",
            "params": {**adam, "torch_adam": not engine.offloads_optimizer},
        },
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }
