"""What a recipe will take on GPUs that are not here: memory, arithmetic, messages and time. Everything is predicted."""

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


class Device(NamedTuple):
    """A GPU of a data sheet, eight to a node."""

    name: str
    tflops: float
    """Dense bf16 matrix products, at their peak."""
    memory_gib: float
    link_gb_s: float
    """To the other GPUs of its node, one way."""
    network_gb_s: float
    """To other nodes, of its own network card, one way."""


DEVICES = {
    device.name: device
    for device in (
        Device("a100", 312, 80, 300, 25),
        Device("h100", 989, 80, 450, 50),
        Device("h200", 989, 141, 450, 50),
        Device("b200", 2250, 180, 900, 50),
    )
}
PER_NODE = 8
EFFICIENCY = 0.5
"""Of the peak, that matrix products and attention reach."""
BANDWIDTH = 0.8
"""Of a link's, that messages reach."""


class MemoryEstimate(NamedTuple):
    """Bytes on the GPU that holds most, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    key_buffers: float


@dataclass(frozen=True)
class LayerKind:
    """One block of the stack. Bytes and numbers of operations are those of one layer."""

    name: str
    mixer: str
    layers: int
    mixer_flops: float
    """A token, forward."""
    mlp_flops: float
    received: float
    """Bytes over context-parallel ranks, a sequence's forward and backward."""
    work: float
    """Of its attention, that of the rank with most over the mean."""
    slowest_flops: float
    """A token, forward, of mixer and MLP on that rank."""
    recomputed_flops: float
    """Of these, what the backward pass does again."""
    choice: Choice | None


@dataclass(frozen=True)
class Estimate:
    parameters: int
    memory: MemoryEstimate
    kinds: list[LayerKind]
    head_flops: float
    compute_s: float
    messages_s: float
    step_s: float
    tokens_per_second: float


def estimate(recipe: Recipe, vocab_size: int, device: Device) -> Estimate:
    """Of a training step on ``launch.processes`` GPUs, in bf16 with fp32 gradients and a distributed optimizer."""
    model, parallel, training = recipe.model, recipe.parallel, recipe.training
    total, vocabulary = parameter_count(model, vocab_size), padded_vocab_size(vocab_size)
    tokens = training.micro_batch_size * training.seq_length / parallel.cp
    chosen = {choice.block: choice for choice in choices(recipe, 2)} if parallel.cp > 1 else {}
    kinds = [_kind(recipe, name, chosen.get(name)) for name in dict.fromkeys(model.stack_names)]
    saved = (
        sum(_saved_numbers(recipe, layer) for layer in range(model.num_hidden_layers)) / parallel.pp
    )
    in_flight = min(
        parallel.pp,
        training.global_batch_size // (recipe.data_parallel * training.micro_batch_size),
    )
    # What is recomputed is there again for one layer at a time.
    modes = [recipe.memory.recompute_of(name) for name in model.stack_names]
    again = [
        _saved_numbers(recipe, layer, "none") for layer, mode in enumerate(modes) if mode != "none"
    ]
    loss = min(tokens, recipe.memory.loss_tile) * vocabulary / parallel.tp * (2 + 4)
    loss += (
        2 * tokens * model.hidden_size + 4 * model.hidden_size * vocabulary / parallel.tp
    )  # gradients made with it
    memory = MemoryEstimate(
        weights=_held(recipe, total, 2, 3),
        gradients=_held(recipe, total, 4, 2),
        optimizer=0.0 if recipe.engine.offloads_optimizer else _held(recipe, total, 12, 1),
        activations=2 * tokens * (saved * in_flight + max(again, default=0)),
        loss=loss,
        key_buffers=max((_buffer(recipe, choice) for choice in chosen.values()), default=0),
    )
    head = 2.0 * model.hidden_size * vocabulary
    forward = head + sum(kind.layers * kind.slowest_flops for kind in kinds)
    tokens_per_step = training.global_batch_size * training.seq_length
    recomputed = sum(kind.layers * kind.recomputed_flops for kind in kinds)
    compute = (
        (3 * forward + recomputed)
        * tokens_per_step
        / recipe.launch.processes
        / (device.tflops * 1e12 * EFFICIENCY)
    )
    speed = (
        (device.link_gb_s if parallel.cp * parallel.tp <= PER_NODE else device.network_gb_s)
        * 1e9
        * BANDWIDTH
    )
    sequences = (
        training.global_batch_size / recipe.data_parallel / training.micro_batch_size / parallel.pp
    )
    messages = sequences * sum(kind.layers * kind.received for kind in kinds) / speed
    step = compute + messages
    return Estimate(total, memory, kinds, head, compute, messages, step, tokens_per_step / step)


def host_bytes(recipe: Recipe, vocab_size: int) -> float:
    """That one rank keeps in the host's memory where the recipe moves something there."""
    model, training = recipe.model, recipe.training
    total, needed = parameter_count(model, vocab_size), 0.0
    if recipe.engine.offloads_optimizer:  # weights, both moments and gradients in fp32
        needed += _held(recipe, total, 16, 1)
    if recipe.engine.offloads_weights:
        needed += _held(recipe, total, 2, 3)
    if recipe.memory.offload_inputs:
        tokens = training.micro_batch_size * training.seq_length / recipe.parallel.cp
        needed += 2 * tokens * model.hidden_size * model.num_hidden_layers / recipe.parallel.pp
    return needed


def _kind(recipe: Recipe, name: str, choice: Choice | None) -> LayerKind:
    model = recipe.model
    layer = model.stack_names.index(name)
    block = model.stack[layer]
    received = choice.received[choice.schedule] if choice else _state_bytes_moved(recipe, layer)
    work = choice.work[choice.schedule] if choice else 1.0
    mixer, mlp = (
        flops_per_token(model, recipe.training.seq_length, layer),
        2.0 * mlp_parameters(model, block, per_token=True),
    )
    projections = 2.0 * mixer_parameters(model, layer)
    slowest = mixer + mlp + (work - 1) * (mixer - projections)
    tiled = mlp if recipe.memory.mlp_tile else 0.0  # once more, whatever is recomputed around it
    again = {"full": slowest + tiled, "selective": projections + mlp + tiled, "none": tiled}
    mode = recipe.memory.recompute_of(name)
    return LayerKind(
        name,
        block.kind(),
        model.stack_names.count(name),
        mixer,
        mlp,
        received,
        work,
        slowest,
        again[mode],
        choice,
    )


def _state_bytes_moved(recipe: Recipe, layer: int) -> float:
    """What the maps of segments and the halos of convolutions bring a rank, forward and backward."""
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


def _held(recipe: Recipe, total: int, each: int, stage: int) -> float:
    """Bytes of a rank that has ``each`` for every parameter, which ZeRO shares among ranks from ``stage`` on (Megatron's
    distributed optimizer is the first).
    """
    model, parallel = recipe.model, recipe.parallel
    shared = recipe.engine.sharding_stage >= stage
    replicas = recipe.data_parallel * parallel.cp
    experts = sum(mlp_parameters(model, block) for block in model.stack if block.mlp == "moe")
    of_dense = (total - experts) / parallel.tp / (replicas if shared else 1)
    copies = replicas * parallel.tp / parallel.ep if parallel.ep > 1 else replicas
    of_experts = (
        experts / (parallel.ep if parallel.ep > 1 else parallel.tp) / (copies if shared else 1)
    )
    return each * (of_dense + of_experts) / parallel.pp


def _saved_numbers(recipe: Recipe, layer: int, mode: str | None = None) -> float:
    """For each token, what a layer keeps for its backward pass on one tensor-parallel rank: inputs of its norms, projections,
    attention and MLP, or of those that are not recomputed.
    """
    model, tp = recipe.model, recipe.parallel.tp
    hidden = model.hidden_size / (tp if recipe.parallel.sequence_parallel else 1)
    mode = mode or recipe.memory.recompute_of(model.stack_names[layer])
    if mode == "full":
        return 0 if recipe.memory.offload_inputs else hidden
    width = model.num_attention_heads * model.kv_channels
    projected = model.stack[layer].projected_numbers(model, layer)
    if mode == "selective":
        return 3 * hidden + (projected + width) / tp
    wide = (
        0
        if recipe.memory.mlp_tile
        else mlp_parameters(model, model.stack[layer], per_token=True) / model.hidden_size
    )
    return 4 * hidden + (projected + 2 * width + wide) / tp


def _buffer(recipe: Recipe, choice: Choice) -> float:
    """Keys and values of others, and in backward their gradients in fp32 beside them."""
    return choice.buffer * (1 + 4 / 2)
