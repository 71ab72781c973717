"""The engine on DeepSpeed: ZeRO 0 to 3 with offload, and tensor and context parallelism, of the same Megatron-core model."""

import contextlib
import io
import logging
import math
import os
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.nn import Parameter

from ..data.batches import Microbatch
from ..errors import UserError
from ..model import weights
from ..recipe.schema import Recipe
from .base import EngineBase, forward
from .deepspeed_config import deepspeed_config
from .deepspeed_state import DeepSpeedState
from .engine import StepResult


class DeepSpeedEngine(EngineBase):
    """See :class:`~longspan.trainer.engines.engine.Engine`.

    DeepSpeed averages gradients over the ranks that have other tokens. The loss that it is given is therefore the sum over a
    rank's labels, times these ranks, over all labels of the step.
    """

    def __init__(self, recipe: Recipe, vocab_size: int):
        super().__init__(recipe, vocab_size)
        self._stage = recipe.engine.zero_stage
        self._sum_over_parts()
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self._engine = _initialize(
            self.model, groups, deepspeed_config(recipe, self.dtype == torch.bfloat16)
        )
        self.resources.callback(self._engine.destroy)
        self._state = DeepSpeedState(self._engine)

    def step(self, batches: list[Microbatch], lr: float) -> StepResult:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        loss_sum, tokens, padding = self._backward(batches)
        self._state.begin_update()
        if self._stage == 0:
            grad_norm = self._clip()
            updated = math.isfinite(grad_norm)
            if not updated:
                self._engine.zero_grad()  # without gradients Adam does nothing
            self._engine.step()
        else:
            self._engine.step()
            grad_norm = float(self._engine.get_global_grad_norm())
            updated = self._engine.was_step_applied()
        return StepResult(loss_sum, tokens, padding, grad_norm, updated, self.balance_loss())

    def evaluate(self, batch: Microbatch) -> tuple[float, int]:
        self._engine.eval()
        with torch.no_grad():
            loss = forward(self._engine, batch)
        self._engine.train()
        loss_sum, tokens = self.summed(loss, batch.weights.sum())
        return loss_sum, int(tokens)

    def gradients(self, batches: list[Microbatch]) -> dict[str, Tensor] | None:
        from deepspeed.utils import safe_get_full_grad

        self._backward(batches)
        gradients = weights.gather(self.model, safe_get_full_grad)
        self._drop_gradients()
        return gradients

    def weights(self) -> dict[str, Tensor] | None:
        return weights.gather(self.model, self._whole)

    def _backward(self, batches: list[Microbatch]) -> tuple[float, int, int]:
        """(Sum of token losses, labels, padding) over all ranks, whose mean gradients are left to DeepSpeed's optimizer."""
        tokens, padding = self.summed(
            sum(batch.weights.sum() for batch in batches), sum(batch.padding for batch in batches)
        )
        scale, total = (
            self.data_group.size() / max(1.0, tokens),
            torch.zeros((), dtype=torch.float64, device=self.device),
        )
        MoEAuxLossAutoScaler.set_loss_scale(
            torch.tensor(scale, device=self.device)
        )  # balance losses join in backward
        for n, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(n == len(batches) - 1)
            loss = forward(self._engine, batch)
            total += loss.detach()
            # An infinite loss may have finite gradients: they must not be taken for those of a step.
            self._engine.backward(
                loss * torch.where(loss.detach().isfinite(), scale, torch.nan), scale_wrt_gas=False
            )
        if self._stage == 3:
            from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

            FWD_MODULE_STACK.clear()  # of modules that recomputation entered and, having what it needs, never left
        return self.summed(total)[0], int(tokens), int(padding)

    def _clip(self) -> float:
        """Under ZeRO 0, what the other stages do in their step."""
        from deepspeed.runtime.utils import clip_grad_norm_

        return float(
            clip_grad_norm_(
                self.model.parameters(), self.recipe.training.max_grad_norm or math.inf, mpu=_Groups
            )
        )

    def _drop_gradients(self) -> None:
        """As the optimizers do with those that are not finite."""
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        optimizer = self._engine.optimizer
        if self._stage == 3:
            optimizer._pre_step()
            optimizer._overflow_clean_up(1.0)
        elif hasattr(optimizer, "clear_hp_grads"):
            optimizer.clear_hp_grads()
            optimizer.clear_lp_grads()
        elif self._stage:
            optimizer.zero_grad()
            optimizer._release_preflattened_grad_buffers()
            if optimizer.cpu_offload:
                optimizer.reset_cpu_buffers()
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        else:
            self._engine.zero_grad()

    def _whole(self, parameter: Parameter) -> Tensor:
        """This tensor-parallel rank's slice, which ZeRO-3 spreads over the ranks of the data."""
        if self._stage < 3:
            return parameter.detach()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _sum_over_parts(self) -> None:
        """Tensor-parallel ranks have their heads' part of the gradient of a norm that all heads share, and under sequence
        parallel their tokens' part of that of any norm.
        """
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            return

        def summed(gradient: Tensor) -> Tensor:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=group)
            return gradient

        for name, parameter in self.model.named_parameters():
            if (
                getattr(parameter, "sequence_parallel", False)
                or "q_layernorm" in name
                or "k_layernorm" in name
            ):
                parameter.register_hook(summed)


class _Groups:
    """Megatron's groups, by the names that DeepSpeed asks for them (its ``mpu``). Its data-parallel ranks are all that have the
    same weights and other tokens, of other sequences or of the same.
    """

    get_model_parallel_rank = get_tensor_model_parallel_rank = staticmethod(
        parallel_state.get_tensor_model_parallel_rank
    )
    get_model_parallel_group = get_tensor_model_parallel_group = staticmethod(
        parallel_state.get_tensor_model_parallel_group
    )
    get_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_rank() -> int:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    @staticmethod
    def get_data_parallel_world_size() -> int:
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)


def _initialize(model: torch.nn.Module, groups: list[dict], config: dict) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # torchrun sets it
    with torch._C.DisableTorchFunction():  # what helps Megatron on a CPU misleads DeepSpeed there
        import deepspeed
        from deepspeed.utils.logging import logger

        logger.setLevel(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):  # how much memory is in use, several times
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
            try:
                return deepspeed.initialize(
                    model=model, model_parameters=groups, mpu=_Groups(), config=config
                )[0]
            except (AssertionError, ValueError) as error:  # of its own checks
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"engine.config: DeepSpeed refuses it: {reason}") from None
