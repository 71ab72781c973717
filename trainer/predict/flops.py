"""How large a recipe's model is, what a sequence leaves behind in it and what a token costs.

All of it is counted without building the model.
"""

from ..layers.base import Block
from ..recipe.schema import ModelConfig


def padded_vocab_size(vocab_size: int) -> int:
    """Return the next multiple of 128, whatever the tensor-parallel size: always the same model."""
    return -(-vocab_size // 128) * 128


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """Count the parameters of the whole model, with its padded vocabulary."""
    num_embeddings = 1 if model.tie_word_embeddings else 2
    embeddings = num_embeddings * padded_vocab_size(vocab_size) * model.hidden_size
    final_norm = model.hidden_size
    layers = sum(
        block.parameter_count(model, layer)
        + len(block.norm_names) * model.hidden_size
        + mlp_parameters(model, block)
        for layer, block in enumerate(model.stack)
    )
    return embeddings + layers + final_norm


def mlp_parameters(model: ModelConfig, block: Block, per_token: bool = False) -> int:
    """Count the parameters of a layer's MLP, or of its experts and their router; ``per_token``
    only those that a token meets.
    """
    if block.mlp == "dense":
        return 3 * model.hidden_size * model.intermediate_size
    assert model.moe is not None
    return model.moe.parameter_count(model.hidden_size, model.intermediate_size, per_token)


def mixer_parameters(model: ModelConfig, layer: int) -> int:
    """Count the parameters of the mixer of one layer (from 0)."""
    return model.stack[layer].parameter_count(model, layer)


def state_bytes(model: ModelConfig, length: int, layer: int | None = None, element: int = 4) -> int:
    """Return the size of what ``length`` tokens of a sequence leave behind for the next one to
    read, in one layer or in all.

    Softmax attention keeps the keys and values that its last token sees, all of them if they are
    chosen from the content; linear attention a state; a convolution its last inputs. Each number
    has ``element`` bytes.
    """
    stack = model.stack
    layers = range(len(stack)) if layer is None else [layer]
    return element * sum(stack[index].state_numbers(model, length, index) for index in layers)


def flops_per_token(model: ModelConfig, length: int, layer: int) -> float:
    """Return the operations per token of the forward pass of a layer's mixer, the mean over a
    sequence; a multiplication and an addition are two.
    """
    return model.stack[layer].flops_per_token(model, length, layer)


def training_flops(model: ModelConfig, length: int, vocab_size: int) -> dict[str, float]:
    """Return the operations per token of a training step, forward and backward: those of each
    block's layers, and of the ``output`` matrix.

    A sparse pattern counts by what it shows, not as a dense one would. What is computed again in
    the backward pass is not counted.
    """
    flops: dict[str, float] = {}
    for name in dict.fromkeys(model.stack_names):
        layer = model.stack_names.index(name)
        mlp = 2.0 * mlp_parameters(model, model.stack[layer], per_token=True)
        forward = flops_per_token(model, length, layer) + mlp
        flops[name] = 3 * forward * model.stack_names.count(name)
    flops["output"] = 6.0 * model.hidden_size * padded_vocab_size(vocab_size)
    return flops
