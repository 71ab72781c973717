"""The engine on DeepSpeed: ZeRO 0 to 3 with offload, for the same Megatron-core model.

It has tensor and context parallelism, and no pipeline or expert parallelism.

Where gradients are summed: at the end of backward DeepSpeed averages them over the ranks that have
other tokens (:attr:`EngineBase.data_group`), under ZeRO 2 and 3 for every microbatch, else once
after the last. Some parameters also need the sum over tensor-parallel ranks: see
:meth:`DeepSpeedEngine._sum_over_tensor_parallel`.
"""

import contextlib
import io
import logging
import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..data.batches import Microbatch
from ..errors import UserError
from ..megatron_core import MoEAuxLossAutoScaler, parallel_state
from ..model import weights
from ..model.cpu import plain_torch
from ..recipe.engine_config import DeepSpeedConfig
from ..recipe.schema import Recipe
from .base import EngineBase, forward
from .deepspeed_config import deepspeed_config
from .deepspeed_state import DeepSpeedState
from .engine import EvaluationResult, StepResult

_NORMS_OF_SHARED_HEADS = ("q_layernorm", "k_layernorm")
"""Norms of one head's width that all heads share.

Megatron's ``finalize_model_grads`` knows them by the same names.
"""


class DeepSpeedEngine(EngineBase):
    """See :class:`~longspan.trainer.engines.engine.Engine`.

    DeepSpeed averages gradients over the ranks that have other tokens. The loss that it is given is
    therefore the sum over a rank's labels, times the number of these ranks, over all labels of the
    step.
    """

    _state: DeepSpeedState

    def __init__(self, recipe: Recipe, vocab_size: int):
        super().__init__(recipe, vocab_size)
        engine_config = recipe.engine
        assert isinstance(engine_config, DeepSpeedConfig)
        self._zero_stage = engine_config.zero_stage
        self._sum_over_tensor_parallel()
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim < 2]
        parameter_groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": vectors, "weight_decay": 0.0},
        ]
        if self.dtype == torch.float16:
            _require_float16()
        config = deepspeed_config(recipe, engine_config, self.dtype)
        self._engine = _initialize(self.model, parameter_groups, config)
        self.resources.callback(self._engine.destroy)
        self._state = DeepSpeedState(self._engine)

    def step(self, batches: list[Microbatch], lr: float) -> StepResult:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        loss_sum, tokens, padding = self._forward_backward(batches)
        self._state.begin_update()
        if self._zero_stage == 0:
            grad_norm = self._clip()
            updated = math.isfinite(grad_norm)
            if not updated:
                self._engine.zero_grad()  # without gradients Adam does nothing
            self._engine.step()
        else:
            self._engine.step()
            grad_norm = float(self._engine.get_global_grad_norm())
            updated = self._engine.was_step_applied()
        scaled = None
        if self.loss_scale:
            # After an overflow DeepSpeed still knows the norm of the step before.
            scaled = self.loss_scale.after_step(loss_sum, grad_norm if updated else math.nan)
        return StepResult(
            loss_sum, tokens, padding, grad_norm, updated, self.balance_loss(), scaled
        )

    def evaluate(self, batch: Microbatch) -> EvaluationResult:
        self._engine.eval()
        with torch.no_grad():
            loss = forward(self._engine, batch)
        self._engine.train()
        loss_sum, tokens = self.sum_over_ranks(loss, batch.weights.sum())
        return EvaluationResult(loss_sum, int(tokens))

    def gradients(self, batches: list[Microbatch]) -> dict[str, Tensor] | None:
        from deepspeed.utils import safe_get_full_grad

        self._forward_backward(batches)
        factor = self.loss_scale.scale if self.loss_scale else 1.0
        gradients = weights.gather(
            self.model, lambda parameter: safe_get_full_grad(parameter) / factor
        )
        self._drop_gradients()
        return gradients

    def weights(self) -> dict[str, Tensor] | None:
        return weights.gather(self.model, self._whole)

    def _forward_backward(self, batches: list[Microbatch]) -> tuple[float, int, int]:
        """Leave the gradients of the mean loss to DeepSpeed's optimizer.

        Returns:
            Sum of token losses, labels, and padding, over all ranks.
        """
        # The number of labels must be known before the first backward.
        tokens, padding = self.sum_over_ranks(
            sum(batch.weights.sum() for batch in batches), sum(batch.padding for batch in batches)
        )
        scale = self.data_group.size() / max(1.0, tokens)
        if self.loss_scale:
            self._engine.optimizer.loss_scaler.cur_scale = self.loss_scale.scale
        # Balance losses join in backward, inside the model.
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale, device=self.device))

        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            loss = forward(self._engine, batch)
            loss_sum += loss.detach()
            # An infinite loss may have finite gradients: they must not be taken for those of a
            # step.
            factor = torch.where(loss.detach().isfinite(), scale, torch.nan)
            self._engine.backward(loss * factor, scale_wrt_gas=False)
        if self._zero_stage == 3:
            from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

            # Recomputation enters modules and, once it has what it needs, never leaves them.
            FWD_MODULE_STACK.clear()
        return self.sum_over_ranks(loss_sum)[0], int(tokens), int(padding)

    def _clip(self) -> float:
        """Clip the gradients and return their norm; the other ZeRO stages do so in their step."""
        from deepspeed.runtime.utils import clip_grad_norm_

        max_norm = self.recipe.training.max_grad_norm or math.inf
        return float(clip_grad_norm_(self.model.parameters(), max_norm, mpu=_MegatronGroups))

    def _drop_gradients(self) -> None:
        """Forget the gradients, as DeepSpeed's optimizers do with those that are not finite."""
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        optimizer = self._engine.optimizer
        if self._zero_stage == 0:
            self._engine.zero_grad()
        elif self._zero_stage == 3:
            optimizer._pre_step()
            optimizer._overflow_clean_up(1.0)
        elif hasattr(optimizer, "clear_hp_grads"):  # ZeRO 1 in bf16 has an optimizer of its own
            optimizer.clear_hp_grads()
            optimizer.clear_lp_grads()
        else:
            optimizer.zero_grad()
            optimizer._release_preflattened_grad_buffers()
            if optimizer.cpu_offload:
                optimizer.reset_cpu_buffers()
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None
                optimizer.all_grad_tensors[group] = None
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID

    def _whole(self, parameter: Parameter) -> Tensor:
        """Return this tensor-parallel rank's slice, which ZeRO-3 spreads over ``data_group``."""
        if self._zero_stage < 3:
            return parameter.detach()
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _sum_over_tensor_parallel(self) -> None:
        """Sum the gradients of some norms over tensor-parallel ranks.

        Megatron's ``finalize_model_grads`` does so for its DDP.

        Each rank has only its heads' part of the gradient of a norm that all heads share and, under
        Megatron's sequence parallel, only its tokens' part of the gradient of any norm.
        """
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            return

        def summed(gradient: Tensor) -> Tensor:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=group)
            return gradient

        for name, parameter in self.model.named_parameters():
            has_token_part = getattr(parameter, "sequence_parallel", False)  # set by our RMSNorm
            has_head_part = any(norm in name for norm in _NORMS_OF_SHARED_HEADS)
            if has_token_part or has_head_part:
                parameter.register_hook(summed)


class _MegatronGroups:
    """Megatron's groups, by the names under which DeepSpeed asks for them (its ``mpu``).

    Its data-parallel ranks are all that have the same weights and other tokens, of other sequences
    or of the same.
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


def _require_float16() -> None:
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        raise UserError(
            "training.dtype: DeepSpeed has no float16 on this device; use float32 or bfloat16, or "
            "engine megatron"
        )


def _initialize(
    model: torch.nn.Module, parameter_groups: list[dict[str, Any]], config: dict
) -> Any:
    """Return DeepSpeed's engine around the model.

    Raises:
        UserError: DeepSpeed refuses the config.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # torchrun sets it
    with plain_torch():
        import deepspeed
        from deepspeed.utils.logging import logger

        logger.setLevel(logging.WARNING)
        # It prints several times how much memory is in use.
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
            try:
                engine, *_ = deepspeed.initialize(
                    model=model,
                    model_parameters=parameter_groups,
                    mpu=_MegatronGroups(),
                    config=config,
                )
            except (AssertionError, ValueError) as error:  # DeepSpeed's own checks
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"engine.config: DeepSpeed refuses it: {reason}") from None
            return engine
