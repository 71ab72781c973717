"""The engine on Megatron-core: DDP with its distributed optimizer, and all of its parallelism.

Tensor, pipeline, expert and context parallelism; gloo on CPU, NCCL on GPUs.

Where gradients are summed: in Megatron's ``finalize_model_grads``, after the last microbatch's
backward. DDP reduce-scatters them over the ranks that have other tokens
(:attr:`EngineBase.data_group`; for experts, fewer); then what each tensor-parallel rank has a part
of is summed over these, the tied embedding over the first and last pipeline stage, and all is
divided by the number of labels on all ranks.

**What Megatron-core needs from us, and cannot be seen from the code that does it:**

- The loss function of a forward step returns three values (sum, number of labels, record) because
  ``calculate_per_token_loss=True``: only then do unequal numbers of labels on the ranks weigh what
  they should.
- Norms of queries and keys are called ``q_layernorm`` and ``k_layernorm``: ``finalize_model_grads``
  sums their gradients over tensor-parallel ranks because of these *names* (and of
  ``config.qk_layernorm``). The DeepSpeed engine, which has no such function, tests the same names.
- A parameter of which each tensor-parallel rank has only its tokens' part of the gradient carries
  the attribute ``sequence_parallel`` (our ``RMSNorm`` sets it); one that is split carries
  ``tensor_model_parallel``, ``partition_dim`` and ``partition_stride``; one that belongs to an
  expert carries ``allreduce = False``.
- First values that are not those of every matrix or vector are an attribute ``initial`` of the
  parameter, which ``trainer/model/weights.py`` asks for: Megatron builds modules and would
  initialize them depending on the ranks.
- Documents and positions reach the mixers as ``packed_seq_params``, the only argument that Megatron
  hands through to layers untouched, under pipeline parallelism and full recomputation too.
- ``rope_theta`` of a mixer changes with a stage of the run: :meth:`EngineBase.begin_stage` finds
  the mixers and sets it, because the modules in between are Megatron's.
- It must not find Transformer Engine or Apex when it is imported (``trainer/megatron_core.py``),
  ``torch.cuda`` must answer on a CPU (``trainer/model/cpu.py``).
- Its config keeps functions of the DDP and the optimizer: :meth:`MegatronEngine.close` takes them
  out, or weights stay in memory.
- Its optimizer keeps the learning rate of its config, and no multiplier of weight decay, unless a
  scheduler writes them into the parameter groups: :meth:`MegatronEngine.step` does.
- Its own checkpoints cannot resume its distributed optimizer without Apex or Transformer Engine:
  :mod:`.megatron_state` reads the optimizer's ranges instead.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.batches import Microbatch
from ..megatron_core import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    MegatronOptimizer,
    OptimizerConfig,
    clip_grad_by_total_norm_fp32,
    finalize_model_grads,
    get_forward_backward_func,
    get_megatron_optimizer,
    parallel_state,
    require_own_optimizer,
)
from ..model import weights
from ..recipe.schema import Recipe
from .base import EngineBase, forward
from .engine import EvaluationResult, StepResult
from .megatron_state import MegatronState


class MegatronEngine(EngineBase):
    """See :class:`~longspan.trainer.engines.engine.Engine`."""

    _state: MegatronState

    def __init__(self, recipe: Recipe, vocab_size: int):
        require_own_optimizer()
        super().__init__(recipe, vocab_size)
        config = self.model.config
        self._ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
            Float16Module(config, self.model) if config.bf16 or config.fp16 else self.model,
        )
        _skip_collectives_of_one_rank(self._ddp)
        self._optimizer = self._build_optimizer()
        self._state = MegatronState(self.model, self._ddp, self._optimizer)
        for optimizer in self._state.optimizers:
            for group in optimizer.optimizer.param_groups:
                group["fused"] = True  # Megatron does not ask torch's AdamW for its fused kernel

        # Megatron's schedules look for these functions in the config.
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = self._ddp.no_sync
        config.grad_scale_func = self._optimizer.scale_loss
        self._schedule = get_forward_backward_func()

    def step(self, batches: list[Microbatch], lr: float) -> StepResult:
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        self._set_loss_factor()
        loss_sum, tokens, padding = self._forward_backward(batches)

        self._optimizer.prepare_grads()  # divides them by the loss's factor
        grad_norm = float(self._optimizer.get_grad_norm())
        # Both are those of all ranks, so the ranks agree.
        updated = math.isfinite(loss_sum) and math.isfinite(grad_norm)
        scaled = self.loss_scale.after_step(loss_sum, grad_norm) if self.loss_scale else None
        result = StepResult(
            loss_sum, tokens, padding, grad_norm, updated, self.balance_loss(), scaled
        )
        if updated:
            self._update(lr, grad_norm)
        return result

    def evaluate(self, batch: Microbatch) -> EvaluationResult:
        self._ddp.eval()
        with torch.no_grad():
            loss_sum, tokens, _ = self._forward_backward([batch], forward_only=True)
        self._ddp.train()
        return EvaluationResult(loss_sum, tokens)

    def gradients(self, batches: list[Microbatch]) -> dict[str, Tensor] | None:
        self._ddp.zero_grad_buffer()
        factor = self._set_loss_factor()
        # All-reduced rather than reduce-scattered, so that each rank has its gradients whole.
        self._forward_backward(batches, force_all_reduce=True)
        gradients = weights.gather(self.model, lambda parameter: _main_grad(parameter) / factor)
        self._ddp.zero_grad_buffer()
        return gradients

    def weights(self) -> dict[str, Tensor] | None:
        return weights.gather(self.model)

    def close(self) -> None:
        # Megatron keeps configs, and these functions would keep all weights, and the threads of all
        # process groups.
        config = self.model.config
        config.finalize_model_grads_func = None
        config.no_sync_func = None
        config.grad_scale_func = None
        # Hooks of autograd hold the DDP, and the graph of the last experts holds the hooks: a
        # circle that Python's garbage collector does not see.
        vars(self._ddp).clear()
        super().close()

    def _build_optimizer(self) -> MegatronOptimizer:
        optimizer = self.recipe.optimizer
        return get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.betas[0],
                adam_beta2=optimizer.betas[1],
                adam_eps=optimizer.eps,
                bf16=self.model.config.bf16,
                fp16=self.model.config.fp16,
                loss_scale=1.0 if self.loss_scale else None,  # a constant: we set it
                params_dtype=self.dtype,
                use_distributed_optimizer=True,
            ),
            [self._ddp],
            use_gloo_process_groups=False,
        )

    def _set_loss_factor(self) -> float:
        """Set and return what Megatron multiplies the loss by; 1 unless the dtype is float16.

        The losses of a microbatch are summed, and their gradients must fit fp16. So the factor is
        that of their mean, up to a power of two.
        """
        if not self.loss_scale:
            return 1.0
        training = self.recipe.training
        tokens = training.micro_batch_size * training.seq_length // self.recipe.parallel.cp
        factor = self.loss_scale.scale / 2.0 ** (tokens.bit_length() - 1)
        for optimizer in self._state.optimizers:
            optimizer.grad_scaler.scale.fill_(factor)
        return factor

    def _update(self, lr: float, grad_norm: float) -> None:
        """Clip the gradients, which are ready, and update the weights."""
        # Megatron's scheduler, not its optimizer, applies the multipliers of weight decay.
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.recipe.optimizer.weight_decay * group["wd_mult"]
        max_grad_norm = self.recipe.training.max_grad_norm
        if max_grad_norm:
            for optimizer in self._state.optimizers:
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), max_grad_norm, grad_norm)
        self._optimizer.step_with_ready_grads()

    def _forward_backward(
        self, batches: list[Microbatch], forward_only: bool = False, **options
    ) -> tuple[float, int, int]:
        """Run Megatron's schedule over the microbatches.

        Args:
            options: of Megatron's schedule.

        Returns:
            Sum of token losses, labels, and padding, over all ranks.
        """
        records = self._schedule(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=[self._ddp],
            num_microbatches=len(batches),
            seq_length=batches[0].sequence.layout.length,
            micro_batch_size=len(batches[0].tokens),
            forward_only=forward_only,
            **options,
        )
        # Only the last pipeline stage has records, [3] for each microbatch; it tells the others.
        if records:
            totals = torch.stack(records).sum(0)
        else:
            totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals, group=self.data_group)
        if self.recipe.parallel.pp > 1:
            dist.broadcast(
                totals,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        loss_sum, tokens, padding = totals.tolist()
        return loss_sum, int(tokens), int(padding)


def _skip_collectives_of_one_rank(ddp: DistributedDataParallel) -> None:
    """Let buckets of a group of one rank start no collectives.

    Gloo would copy them through new memory at each step.
    """
    for buckets in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
        if buckets.intra_distributed_optimizer_instance_size == 1:
            buckets.start_grad_sync = _no_collective
            buckets.start_param_sync = _no_collective


def _no_collective(**options) -> None:
    """Do nothing, in place of a collective of one rank."""


def _forward_step(batches, model):
    """Return the output of a microbatch, and the function that makes Megatron's three values of it.

    Those are the loss sum, the number of labels and a record, ``[3]``.
    """
    batch: Microbatch = next(batches)

    def loss(loss_sum: Tensor):
        tokens = batch.weights.sum()
        padding = torch.full_like(loss_sum, batch.padding)
        record = torch.stack([loss_sum.detach(), tokens, padding]).double()
        return loss_sum, tokens.int(), record

    return forward(model, batch), loss


def _main_grad(parameter: Any) -> Tensor:
    """Return the gradient that DDP keeps beside a parameter, in fp32."""
    return parameter.main_grad
