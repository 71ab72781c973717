"""The engines that a recipe may name, each with its problems and with what it shares or offloads."""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..errors import suggest
from ..layers.base import Section
from .problem import Problem, Problems

_PASSED_ON = (
    "aio",
    "communication_data_type",
    "gradient_predivide_factor",
    "prescale_gradients",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
"""DeepSpeed's keys that a recipe may set."""
_ZERO_PASSED_ON = (
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
"""The same within ``zero_optimization``: those that leave parameters, gradients and moments where
checkpoints look for them."""
_KEYS_OF_RECIPE = {
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
"""DeepSpeed's keys that follow from a key of the recipe."""
_OFFLOAD_STAGES = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
"""ZeRO stages at which DeepSpeed can offload."""


class EngineConfig(Section):
    has_expert_parallel: ClassVar[bool]
    """Whether experts may be spread over ranks (``parallel.ep``)."""
    offload_key: ClassVar[str]
    """The key of a recipe that moves what a rank holds to host memory."""

    @property
    @abstractmethod
    def sharding_stage(self) -> int:
        """What data- and context-parallel ranks share, by ZeRO's stages: 1 the optimizer's state, 2
        gradients too, 3 weights too.
        """

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state and update are on the CPU."""
        return False

    @property
    def offloads_weights(self) -> bool:
        """Whether weights wait in host memory."""
        return False

    def problems(self, pp: int, dtype: str) -> Problems:
        """Yield what the engine cannot do, with the recipe's ``parallel.pp`` and ``training.dtype``."""
        yield from ()


class MegatronConfig(EngineConfig):
    """Megatron-core's DDP and distributed optimizer."""

    name: Literal["megatron"] = "megatron"
    """Every degree of parallel."""

    has_expert_parallel: ClassVar[bool] = True
    offload_key: ClassVar[str] = "memory.offload_inputs"

    @property
    def sharding_stage(self) -> int:
        return 1


class DeepSpeedConfig(EngineConfig):
    """DeepSpeed's ZeRO; context and tensor parallel, no pipeline."""

    name: Literal["deepspeed"]
    """tp, cp and data parallel."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """What data- and context-parallel ranks share: 1 the optimizer's state, 2 gradients too, 3
    weights too."""
    config: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed's own keys, like zero_optimization: {offload_optimizer: {device: cpu}}."""

    has_expert_parallel: ClassVar[bool] = False
    offload_key: ClassVar[str] = "engine.config.zero_optimization"

    @property
    def sharding_stage(self) -> int:
        return self.zero_stage

    @property
    def offloads_optimizer(self) -> bool:
        return self._offloads("offload_optimizer")

    @property
    def offloads_weights(self) -> bool:
        return self._offloads("offload_param")

    def _offloads(self, key: str) -> bool:
        section = self.config.get("zero_optimization", {}).get(key) or {}
        return section.get("device", "none") != "none"

    def problems(self, pp: int, dtype: str) -> Problems:
        """Yield what DeepSpeed cannot do, and keys that both it and the recipe set."""
        if pp > 1:
            yield Problem(
                "parallel.pp",
                f"{pp} needs engine megatron: DeepSpeed's pipeline accepts only other models; use tp, cp or ZeRO",
            )
        if self.zero_stage == 0 and dtype != "float32":
            yield Problem(
                "engine.zero_stage",
                "0 adds up gradients in the weights' dtype; use 1, or set training.dtype to float32",
            )
        for key in self.config:
            if key in _KEYS_OF_RECIPE:
                reason = f"is {_KEYS_OF_RECIPE[key]} of the recipe; remove it"
                yield Problem(f"engine.config.{key}", reason)
            elif key not in _PASSED_ON:
                known = ", ".join(_PASSED_ON)
                reason = f"unknown{suggest(key, list(_PASSED_ON))}; keys passed on: {known}"
                yield Problem(f"engine.config.{key}", reason)
        yield from self._zero_problems()

    def _zero_problems(self) -> Problems:
        section = "engine.config.zero_optimization"
        zero = self.config.get("zero_optimization", {})
        if not isinstance(zero, dict):
            yield Problem(section, f"must be a section, got {zero!r}")
            return
        for key in zero:
            if key == "stage":
                yield Problem(f"{section}.stage", "is engine.zero_stage of the recipe; remove it")
            elif key not in _ZERO_PASSED_ON:
                known = ", ".join(_ZERO_PASSED_ON)
                suggestion = suggest(key, list(_ZERO_PASSED_ON))
                reason = f"is not passed on{suggestion}; keys passed on: {known}"
                yield Problem(f"{section}.{key}", reason)
        for key, stages in _OFFLOAD_STAGES.items():
            offload = zero.get(key)
            if offload is not None and self.zero_stage not in stages:
                known = " or ".join(map(str, stages))
                reason = f"needs engine.zero_stage {known}, it is {self.zero_stage}"
                yield Problem(f"{section}.{key}", reason)
            elif isinstance(offload, dict) and offload.get("device") == "nvme":
                reason = "nvme: the state could not be put into checkpoints; use cpu"
                yield Problem(f"{section}.{key}.device", reason)


AnyEngine = Annotated[MegatronConfig | DeepSpeedConfig, Field(discriminator="name")]
