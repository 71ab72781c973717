"""What a recipe will need on GPUs that are not here: memory, arithmetic, messages and time. All of
it is predicted.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ...parallel.linear import scan_steps
from ..layers.base import ContextSplit
from ..recipe.schema import Recipe
from .communication import Choice, choices, recipe_layout
from .flops import (
    flops_per_token,
    mixer_parameters,
    mlp_parameters,
    padded_vocab_size,
    parameter_count,
)

GIB = 2**30
_BF16_BYTES, _FP32_BYTES = 2, 4


class Device(NamedTuple):
    """A GPU as its data sheet has it, eight to a node."""

    name: str
    tflops: float
    """Peak of dense bf16 matrix products, in 10^12 operations per second."""
    memory_gib: float
    link_gb_s: float
    """GB/s to the other GPUs of its node, one way."""
    network_gb_s: float
    """GB/s to other nodes through its own network card, one way."""
    capability: int
    """Compute capability: 90 for 9.0."""
    processors: int
    """Streaming multiprocessors."""


DEVICES = {
    device.name: device
    for device in (
        Device("a100", 312, 80, 300, 25, 80, 108),
        Device("h100", 989, 80, 450, 50, 90, 132),
        Device("h200", 989, 141, 450, 50, 90, 132),
        Device("b200", 2250, 180, 900, 50, 100, 148),
        Device("b300", 2250, 288, 900, 100, 103, 160),
        # These have no NVLink: their link is PCIe.
        Device("a10", 125, 24, 32, 12.5, 86, 72),
        Device("l40s", 362, 48, 32, 25, 89, 142),
        Device("4090", 165, 24, 32, 12.5, 89, 128),
        Device("5090", 210, 32, 64, 12.5, 120, 170),
        Device("pro6000", 504, 96, 64, 50, 120, 188),
    )
}
PER_NODE = 8
EFFICIENCY = 0.5
"""Share of the peak that matrix products and attention reach."""
BANDWIDTH = 0.8
"""Share of a link's bandwidth that messages reach."""


class MemoryEstimate(NamedTuple):
    """Bytes on the GPU that holds most, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    key_buffers: float


@dataclass(frozen=True)
class LayerEstimate:
    """One block of the stack; bytes and numbers of operations are those of one layer."""

    name: str
    mixer: str
    layers: int
    """Number of layers with this block."""
    mixer_flops: float
    """Per token, forward."""
    mlp_flops: float
    """Per token, forward."""
    received: float
    """Bytes from other context-parallel ranks in a microbatch's forward and backward pass."""
    work: float
    """Attention work of the rank with most, over the mean of all."""
    slowest_flops: float
    """Per token, forward, of mixer and MLP on that rank."""
    recomputed_flops: float
    """Of these, what the backward pass computes again."""
    choice: Choice | None
    """The KV schedule; None if the block has none, or there is one context-parallel rank."""


@dataclass(frozen=True)
class Estimate:
    """What a training step needs."""

    parameters: int
    memory: MemoryEstimate
    kinds: list[LayerEstimate]
    head_flops: float
    """Per token, forward, of the output matrix."""
    compute_s: float
    messages_s: float
    step_s: float
    tokens_per_second: float


def estimate(recipe: Recipe, vocab_size: int, device: Device) -> Estimate:
    """Predict a training step on ``launch.processes`` GPUs, in bf16 with fp32 gradients and a
    distributed optimizer.
    """
    choice_of = {}
    if recipe.parallel.cp > 1:
        choice_of = {choice.block: choice for choice in choices(recipe, _BF16_BYTES)}
    names = dict.fromkeys(recipe.model.stack_names)
    kinds = [_layer_estimate(recipe, name, choice_of.get(name)) for name in names]
    head_flops = 2.0 * recipe.model.hidden_size * padded_vocab_size(vocab_size)
    compute_s = _compute_seconds(recipe, kinds, head_flops, device)
    messages_s = _message_seconds(recipe, kinds, device)
    step_s = compute_s + messages_s
    return Estimate(
        parameters=parameter_count(recipe.model, vocab_size),
        memory=_memory(recipe, vocab_size, list(choice_of.values())),
        kinds=kinds,
        head_flops=head_flops,
        compute_s=compute_s,
        messages_s=messages_s,
        step_s=step_s,
        tokens_per_second=recipe.tokens_per_step / step_s,
    )


def _compute_seconds(
    recipe: Recipe, kinds: list[LayerEstimate], head_flops: float, device: Device
) -> float:
    forward = head_flops + sum(kind.layers * kind.slowest_flops for kind in kinds)
    recomputed = sum(kind.layers * kind.recomputed_flops for kind in kinds)
    step_flops = (3 * forward + recomputed) * recipe.tokens_per_step
    return step_flops / recipe.launch.processes / (device.tflops * 1e12 * EFFICIENCY)


def _message_seconds(recipe: Recipe, kinds: list[LayerEstimate], device: Device) -> float:
    training, parallel = recipe.training, recipe.parallel
    within_node = parallel.cp * parallel.tp <= PER_NODE
    link_gb_s = device.link_gb_s if within_node else device.network_gb_s
    microbatches = (
        training.global_batch_size / recipe.data_parallel / training.micro_batch_size / parallel.pp
    )
    received = sum(kind.layers * kind.received for kind in kinds)
    return microbatches * received / (link_gb_s * 1e9 * BANDWIDTH)


def _memory(recipe: Recipe, vocab_size: int, schedule_choices: list[Choice]) -> MemoryEstimate:
    num_parameters = parameter_count(recipe.model, vocab_size)
    tokens = _tokens_per_rank(recipe)
    # Master weights and both moments, in fp32.
    optimizer = _bytes_held(recipe, num_parameters, 3 * _FP32_BYTES, sharded_from_stage=1)
    buffers = [_key_buffer_bytes(choice) for choice in schedule_choices]
    return MemoryEstimate(
        weights=_bytes_held(recipe, num_parameters, _BF16_BYTES, sharded_from_stage=3),
        gradients=_bytes_held(recipe, num_parameters, _FP32_BYTES, sharded_from_stage=2),
        optimizer=0.0 if recipe.engine.offloads_optimizer else optimizer,
        activations=_BF16_BYTES * tokens * _saved_numbers_of_stage(recipe),
        loss=_loss_bytes(recipe, tokens, vocab_size),
        key_buffers=max(buffers, default=0),
    )


def _tokens_per_rank(recipe: Recipe) -> float:
    """Return the tokens of a microbatch on one context-parallel rank."""
    return recipe.training.micro_batch_size * recipe.training.seq_length / recipe.parallel.cp


def _saved_numbers_of_stage(recipe: Recipe) -> float:
    """Return the numbers per token that a pipeline stage keeps for all microbatches in flight."""
    training, parallel = recipe.training, recipe.parallel
    names = recipe.model.stack_names
    modes = [recipe.memory.recompute_of(name) for name in names]
    saved = sum(_saved_numbers(recipe, layer, mode) for layer, mode in enumerate(modes))
    saved /= parallel.pp
    microbatches = training.global_batch_size // (recipe.data_parallel * training.micro_batch_size)
    in_flight = min(parallel.pp, microbatches)
    # What a layer recomputes exists again, for one layer at a time.
    recomputed = [
        _saved_numbers(recipe, layer, "none") for layer, mode in enumerate(modes) if mode != "none"
    ]
    return saved * in_flight + max(recomputed, default=0)


def _loss_bytes(recipe: Recipe, tokens: float, vocab_size: int) -> float:
    hidden_size = recipe.model.hidden_size
    tp = recipe.parallel.tp
    vocab_rows = padded_vocab_size(vocab_size)
    tile_logits = min(tokens, recipe.memory.loss_tile) * vocab_rows / tp
    logits = tile_logits * (_BF16_BYTES + _FP32_BYTES)
    grad_hidden = _BF16_BYTES * tokens * hidden_size
    grad_weight = _FP32_BYTES * hidden_size * vocab_rows / tp
    return logits + (grad_hidden + grad_weight)


def host_bytes(recipe: Recipe, vocab_size: int) -> float:
    """Return the bytes that one rank keeps in host memory, if the recipe moves something there."""
    model, engine = recipe.model, recipe.engine
    num_parameters = parameter_count(model, vocab_size)
    needed = 0.0
    if engine.offloads_optimizer:
        # Weights, both moments and gradients, in fp32.
        needed += _bytes_held(recipe, num_parameters, 4 * _FP32_BYTES, sharded_from_stage=1)
    if engine.offloads_weights:
        needed += _bytes_held(recipe, num_parameters, _BF16_BYTES, sharded_from_stage=3)
    if recipe.memory.offload_inputs:
        inputs = _BF16_BYTES * _tokens_per_rank(recipe) * model.hidden_size
        needed += inputs * model.num_hidden_layers / recipe.parallel.pp
    return needed


def _layer_estimate(recipe: Recipe, name: str, choice: Choice | None) -> LayerEstimate:
    model = recipe.model
    layer = model.stack_names.index(name)
    block = model.stack[layer]
    mixer_flops = flops_per_token(model, recipe.training.seq_length, layer)
    mlp_flops = 2.0 * mlp_parameters(model, block, per_token=True)
    projection_flops = 2.0 * mixer_parameters(model, layer)

    if choice is None:
        received = _exchanged_bytes(recipe, layer)
        work = 1.0
    else:
        received = choice.received[choice.schedule]
        work = choice.work[choice.schedule]
    slowest_flops = mixer_flops + mlp_flops + (work - 1) * (mixer_flops - projection_flops)

    # Tiles of an MLP are computed once more, whatever else is recomputed.
    tiled_flops = mlp_flops if recipe.memory.mlp_tile else 0.0
    recomputed_flops = {
        "full": slowest_flops + tiled_flops,
        "selective": projection_flops + mlp_flops + tiled_flops,
        "none": tiled_flops,
    }
    return LayerEstimate(
        name=name,
        mixer=block.kind(),
        layers=model.stack_names.count(name),
        mixer_flops=mixer_flops,
        mlp_flops=mlp_flops,
        received=received,
        work=work,
        slowest_flops=slowest_flops,
        recomputed_flops=recomputed_flops[recipe.memory.recompute_of(name)],
        choice=choice,
    )


def _exchanged_bytes(recipe: Recipe, layer: int) -> float:
    """Return the bytes of states and halos that a microbatch's forward and backward pass brings a
    context-parallel rank.
    """
    parallel = recipe.parallel
    if parallel.cp == 1:
        return 0.0
    layout = recipe_layout(recipe)
    split = ContextSplit(
        ranks=parallel.cp,
        segments=max(map(len, layout.segments)),
        state_steps=scan_steps(layout) or parallel.cp - 1,
        tensor_ranks=parallel.tp,
    )
    block = recipe.model.stack[layer]
    batch = recipe.training.micro_batch_size
    return batch * block.exchanged_bytes(recipe.model, layer, split)


def _bytes_held(
    recipe: Recipe, num_parameters: int, bytes_each: int, sharded_from_stage: int
) -> float:
    """Return the bytes of a rank that holds ``bytes_each`` for every parameter of its part of the
    model.

    Replicas share them from that ZeRO stage on; Megatron's distributed optimizer is stage 1.
    """
    model, parallel = recipe.model, recipe.parallel
    is_sharded = recipe.engine.sharding_stage >= sharded_from_stage
    replicas = recipe.data_parallel * parallel.cp
    experts = sum(mlp_parameters(model, block) for block in model.stack if block.mlp == "moe")

    dense_per_rank = (num_parameters - experts) / parallel.tp / (replicas if is_sharded else 1)
    if parallel.ep > 1:  # each expert is whole on its rank
        expert_ranks = parallel.ep
        expert_replicas = replicas * parallel.tp / parallel.ep
    else:
        expert_ranks = parallel.tp
        expert_replicas = float(replicas)
    experts_per_rank = experts / expert_ranks / (expert_replicas if is_sharded else 1)
    return bytes_each * (dense_per_rank + experts_per_rank) / parallel.pp


def _saved_numbers(recipe: Recipe, layer: int, recompute: str) -> float:
    """Return the numbers per token that a layer keeps for its backward pass on one tensor-parallel
    rank: inputs of norms, projections, attention and MLP, or of those that are not recomputed.
    """
    model, tp = recipe.model, recipe.parallel.tp
    block = model.stack[layer]
    hidden = model.hidden_size / (tp if recipe.parallel.sequence_parallel else 1)
    if recompute == "full":
        return 0 if recipe.memory.offload_inputs else hidden
    width = model.num_attention_heads * model.kv_channels
    projected = block.projected_numbers(model, layer)
    if recompute == "selective":
        return 3 * hidden + (projected + width) / tp
    mlp = 0.0
    if not recipe.memory.mlp_tile:
        mlp = mlp_parameters(model, block, per_token=True) / model.hidden_size
    return 4 * hidden + (projected + 2 * width + mlp) / tp


def _key_buffer_bytes(choice: Choice) -> float:
    """Return the bytes of others' keys and values, and of their fp32 gradients beside them."""
    return choice.buffer * (1 + _FP32_BYTES / _BF16_BYTES)
