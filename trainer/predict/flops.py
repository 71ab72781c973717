"""How large a recipe's model is, what a sequence leaves behind in it and what a token costs, counted without building it."""

from ..layers.base import Block
from ..recipe.schema import ModelConfig


def padded_vocab_size(vocab_size: int) -> int:
    """The next multiple of 128: whatever the tensor-parallel size, the same model."""
    return -(-vocab_size // 128) * 128


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """Count the parameters of the whole model, with its padded vocabulary."""
    matrices = 1 if model.tie_word_embeddings else 2
    embeddings = matrices * padded_vocab_size(vocab_size) * model.hidden_size
    final_norm = model.hidden_size
    layers = sum(
        len(block.norm_names) * model.hidden_size
        + block.parameter_count(model, layer)
        + mlp_parameters(model, block)
        for layer, block in enumerate(model.stack)
    )
    return embeddings + layers + final_norm


def mlp_parameters(model: ModelConfig, block: Block, per_token: bool = False) -> int:
    """Of the MLP of one layer, or of its experts and their router; ``per_token`` of those alone that a token goes through."""
    if block.mlp == "dense":
        return 3 * model.hidden_size * model.intermediate_size
    assert model.moe is not None
    return model.moe.parameter_count(model.hidden_size, model.intermediate_size, per_token)


def mixer_parameters(model: ModelConfig, layer: int) -> int:
    """Count the parameters of the mixer of one layer (from 0)."""
    return model.stack[layer].parameter_count(model, layer)


def state_bytes(model: ModelConfig, length: int, layer: int | None = None, element: int = 4) -> int:
    """What ``length`` tokens of one sequence leave behind for the next one to read, of one layer or of all.

    Softmax attention keeps the keys and values that its last token sees, all of them where they are chosen from the content;
    linear attention a state; a convolution its last inputs. Each number takes ``element`` bytes.
    """
    layers = range(len(model.stack)) if layer is None else [layer]
    stack = model.stack
    return element * sum(stack[each].state_numbers(model, length, each) for each in layers)


def flops_per_token(model: ModelConfig, length: int, layer: int) -> float:
    """Of the forward pass of a layer's mixer, a mean over a sequence; a multiplication and an addition are two."""
    return model.stack[layer].flops_per_token(model, length, layer)


def training_flops(model: ModelConfig, length: int, vocab_size: int) -> dict[str, float]:
    """Of a token in a training step, forward and backward, by block and of the ``output`` matrix: what a sparse pattern shows
    counts, not what a dense one would. Nothing that is computed again.
    """
    found: dict[str, float] = {}
    for name in dict.fromkeys(model.stack_names):
        layer = model.stack_names.index(name)
        forward = flops_per_token(model, length, layer) + 2.0 * mlp_parameters(
            model, model.stack[layer], per_token=True
        )
        found[name] = 3 * forward * model.stack_names.count(name)
    return {**found, "output": 6.0 * model.hidden_size * padded_vocab_size(vocab_size)}
