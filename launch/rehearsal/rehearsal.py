"""Runs a recipe's training step on a fake GPU, as one of fake ranks, and says what it did."""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ...attention.backend_choice import choices
from ...trainer.data.batches import Microbatch, microbatch
from ...trainer.data.samples import Sample
from ...trainer.data.tokenizer import recipe_vocab_size
from ...trainer.predict.estimate import Device, estimate
from ...trainer.recipe.schema import Recipe
from .device_memory import DeviceMemory
from .fake_gpu import pretend_gpu
from .fake_ranks import pretend_ranks
from .fake_triton import record_launches
from .known_values import KnownValues
from .outcome import Outcome, Peak, Size, outcome
from .recorder import CHECKPOINT, EVALUATION, FIRST, STEADY, Recorder


def rehearse(recipe: Recipe, device: Device, rank: int, documents: int) -> Outcome:
    """Build the recipe's engine, and rehearse two steps, an evaluation and a checkpoint.

    In this process nothing else can be done any more: torch believes in the GPU from here on.

    Args:
        documents: number of equal documents in each sequence.
    """
    memory = DeviceMemory()
    values = KnownValues()
    recorder = Recorder(memory, values)
    pretend_gpu(device, recorder)
    pretend_ranks(rank, recipe.launch.processes, recorder)
    variants = record_launches(recorder)
    began = time.monotonic()
    vocab_size = recipe_vocab_size(recipe)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder:
        from ...trainer.engines.build import build_engine

        recorder.phase = "build"
        engine = build_engine(recipe, vocab_size)
        _balance_experts(engine.model, values)  # type: ignore[attr-defined]
        engine.begin_stage(recipe)
        batches = _batches(recipe, documents, engine)

        recorder.kind = "activations"
        for phase in (FIRST, STEADY):
            recorder.phase = phase
            memory.restart_peak()
            _name_what_stays(engine, memory)
            engine.step(batches, lr=1e-4)
            memory.finish()
        peak = Peak(
            bytes=memory.peak,
            by_kind=dict(memory.kinds_at_peak),
            by_place=dict(memory.places_at_peak.most_common(12)),
        )

        recorder.phase = EVALUATION
        engine.evaluate(batches[0])
        recorder.phase = CHECKPOINT
        for shards in engine.state().values():
            shards.snapshot()
    return outcome(
        recorder=recorder,
        variants=variants,
        backends=choices,
        size=Size(
            layers=len(engine.model.decoder.layers),  # type: ignore[attr-defined]
            microbatches=len(batches),
        ),
        peak=peak,
        planned=int(sum(estimate(recipe, vocab_size, device).memory)),
        seconds=time.monotonic() - began,
    )


def _name_what_stays(engine: Any, memory: DeviceMemory) -> None:
    """Tell weights, gradients and the optimizer's state apart: Adam makes its own in a step."""
    from ...trainer.engines.megatron import MegatronEngine

    if isinstance(engine, MegatronEngine):
        for buffer in engine._ddp.buffers + engine._ddp.expert_parallel_buffers:
            memory.rename(buffer.grad_data, "gradients")
        for optimizer in engine._state.optimizers:
            for parameter in optimizer.get_parameters():
                memory.rename(parameter, "optimizer")
    for state in engine._state.optimizer_states():
        for tensor in state.values():
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                memory.rename(tensor, "optimizer")


def _batches(recipe: Recipe, documents: int, engine: Any) -> list[Microbatch]:
    """Return a rank's microbatches of a step: zeros, in ``documents`` documents a sequence.

    As many as the pipeline holds at a time, and at least two, say all there is to say.
    """
    length = recipe.training.seq_length
    alignment = recipe.model.document_alignment
    starts = np.linspace(0, length // alignment, documents, endpoint=False).astype(int)
    ids = np.searchsorted(np.unique(starts) * alignment, np.arange(length), "right") - 1
    zeros = np.zeros(length, dtype=np.int64)
    sample = Sample(zeros, zeros, np.ones(length, np.float32), ids.astype(np.int32), padding=0)

    training = recipe.training
    num_batches = training.global_batch_size // recipe.data_parallel // training.micro_batch_size
    num_batches = min(num_batches, max(2, recipe.parallel.pp))
    samples = [sample] * training.micro_batch_size
    return [
        microbatch(recipe, samples, engine.batch_shard.context_rank, engine.device)
        for _ in range(num_batches)
    ]


def _balance_experts(model: torch.nn.Module, values: KnownValues) -> None:
    """Let routers send tokens to all experts alike, as they do in a trained model.

    Their choices decide sizes, and fake scores choose nothing.
    """
    from ...trainer.model.moe import BalancedRouter

    for module in model.modules():
        if isinstance(module, BalancedRouter):
            module.register_forward_hook(_Balanced(values, module.topk))


class _Balanced:
    """A hook of a router that makes its choices known."""

    def __init__(self, values: KnownValues, topk: int):
        self.values = values
        self.topk = topk

    def __call__(self, module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        chosen = output[1]  # bool [tokens, experts]
        tokens, experts = chosen.shape
        with unset_fake_temporarily():
            first = torch.arange(tokens)[:, None] * self.topk
            numbers = (first + torch.arange(self.topk)) % experts
            twin = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, numbers, True)
        self.values.set(chosen, twin)
