"""The engine on Megatron-core: DDP with its distributed optimizer, and tensor, pipeline and context parallelism.

Gloo on CPU, NCCL on GPUs.
"""

import contextlib
import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from ..parallel import Sequence
from . import weights
from .cpu import megatron_on_cpu
from .data.batches import Microbatch, Share
from .engine import StepResult
from .megatron_state import MegatronState
from .model import build_model
from .recipe import Recipe
from .shards import Shards
from .size import parameter_count


class MegatronEngine:
    """See :class:`~longspan.trainer.engine.Engine`. One per process: Megatron's groups are global."""

    def __init__(self, recipe: Recipe, vocab_size: int):
        self.recipe = recipe
        self._resources = contextlib.ExitStack()
        self._resources.enter_context(megatron_on_cpu())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=recipe.parallel.tp,
            pipeline_model_parallel_size=recipe.parallel.pp,
            context_parallel_size=recipe.parallel.cp,
        )
        self._resources.callback(parallel_state.destroy_model_parallel)
        model_parallel_cuda_manual_seed(recipe.training.seed)
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        degrees = recipe.parallel
        self.ranks = f"{self.device.type} dp {recipe.data_parallel} cp {degrees.cp} pp {degrees.pp} tp {degrees.tp}"
        self.num_parameters = parameter_count(recipe.model, vocab_size)
        self.share = Share(
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
        )

        self.dtype = _dtype(recipe)
        self.model = build_model(recipe, vocab_size, self.dtype)
        config = self.model.config
        weights.initialise(self.model, recipe.training.seed, recipe.model.initializer_range, config.num_layers)
        inner = Float16Module(config, self.model) if config.bf16 else self.model
        self._ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
            inner,
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = self._ddp.no_sync
        chosen = recipe.optimizer
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=chosen.lr,
                weight_decay=chosen.weight_decay,
                adam_beta1=chosen.betas[0],
                adam_beta2=chosen.betas[1],
                adam_eps=chosen.eps,
                bf16=config.bf16,
                params_dtype=self.dtype,
                use_distributed_optimizer=True,
            ),
            [self._ddp],
        )
        config.grad_scale_func = self._optimizer.scale_loss
        self._state = MegatronState(self.model, self._ddp, self._optimizer)
        self._forward_backward = get_forward_backward_func()

    def step(self, batches: list[Microbatch], lr: float) -> StepResult:
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss_sum, tokens, padding = self._run(batches)
        self._optimizer.prepare_grads()
        grad_norm = float(self._optimizer.get_grad_norm())
        if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):  # of all ranks: they agree
            return StepResult(loss_sum, tokens, padding, grad_norm, updated=False)
        for group in self._optimizer.param_groups:  # Megatron's scheduler, not its optimizer, applies the multipliers
            group["lr"] = lr
            group["weight_decay"] = self.recipe.optimizer.weight_decay * group["wd_mult"]
        if self.recipe.training.max_grad_norm:
            clip_grad_by_total_norm_fp32(self._optimizer.get_parameters(), self.recipe.training.max_grad_norm, grad_norm)
        self._optimizer.step_with_ready_grads()
        return StepResult(loss_sum, tokens, padding, grad_norm)

    def state(self) -> dict[str, Shards]:
        return self._state.shards()

    def restored(self, state: dict[str, Shards]) -> None:
        self._state.restored(state)

    def evaluate(self, batch: Microbatch) -> tuple[float, int]:
        self._ddp.eval()
        with torch.no_grad():
            loss_sum, tokens, _ = self._run([batch], forward_only=True)
        self._ddp.train()
        return loss_sum, tokens

    def gradients(self, batches: list[Microbatch]) -> dict[str, Tensor] | None:
        self._ddp.zero_grad_buffer()
        # All-reduced rather than reduce-scattered, so that each rank has its gradients whole.
        self._run(batches, force_all_reduce=True)
        gradients = weights.gather(self.model, lambda parameter: parameter.main_grad)
        self._ddp.zero_grad_buffer()
        return gradients

    def weights(self) -> dict[str, Tensor] | None:
        return weights.gather(self.model)

    def load_weights(self, whole: dict[str, Tensor]) -> None:
        weights.load_weights(self.model, whole)
        self._optimizer.reload_model_params()

    def logits(self, tokens: Tensor) -> Tensor:
        sequence = Sequence.single(*tokens.shape, device=tokens.device)
        with torch.no_grad():
            logits = self.model(tokens, None, None, packed_seq_params=sequence)
        return logits[..., : self.model.real_vocab_size].float()

    def close(self) -> None:
        self._resources.close()

    def _run(self, batches: list[Microbatch], **options) -> tuple[float, int, int]:
        """Forward (and backward) over the microbatches; (sum of token losses, labels, padding) over all ranks."""
        outputs = self._forward_backward(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=[self._ddp],
            num_microbatches=len(batches),
            seq_length=self.recipe.training.seq_length,
            micro_batch_size=self.recipe.training.micro_batch_size,
            **{"forward_only": False, **options},
        )
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        for output in outputs:  # only the last pipeline stage has any
            totals += output
        dist.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if self.recipe.parallel.pp > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(totals, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        loss_sum, tokens, padding = totals.tolist()
        return loss_sum, int(tokens), int(padding)


def _forward_step(batches, model):
    """Megatron's forward step: the output, and the function that makes (loss sum, labels, record) of it."""
    batch: Microbatch = next(batches)
    output = model(batch.tokens, None, None, labels=batch.labels, loss_mask=batch.weights, packed_seq_params=batch.sequence)

    def loss(loss_sum: Tensor):
        tokens = batch.weights.sum()
        padding = torch.full_like(loss_sum, batch.padding)
        return loss_sum, tokens.int(), torch.stack([loss_sum.detach(), tokens, padding]).double()

    return output, loss


def _dtype(recipe: Recipe) -> torch.dtype:
    name = recipe.training.dtype
    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, name)
