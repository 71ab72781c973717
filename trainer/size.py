"""How large a recipe's model is, counted without building it."""

from .recipe import Block, LightningBlock, Model, SoftmaxBlock


def padded_vocab_size(vocab_size: int) -> int:
    """The next multiple of 128: whatever the tensor-parallel size, the same model."""
    return -(-vocab_size // 128) * 128


def parameter_count(model: Model, vocab_size: int) -> int:
    """Parameters of the whole model, with its padded vocabulary."""
    embeddings = padded_vocab_size(vocab_size) * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return embeddings + sum(_layer(model, block) for block in model.stack) + model.hidden_size


def _layer(model: Model, block: Block) -> int:
    hidden, width = model.hidden_size, model.num_attention_heads * model.kv_channels
    norms = {"pre": 2, "post": 2, "sandwich": 4, "reordered": 2}[block.norm] * hidden
    mixer = width * hidden  # the output projection
    if isinstance(block, LightningBlock):
        mixer += (4 if block.output_gate else 3) * width * hidden + width
    elif isinstance(block, SoftmaxBlock):
        mixer += ((2 if block.output_gate else 1) * width + 2 * model.kv_heads * model.kv_channels) * hidden
        mixer += 2 * model.kv_channels if block.qk_norm else 0
        mixer += model.num_attention_heads if block.attention_sink else 0
    return norms + mixer + 3 * hidden * model.intermediate_size
