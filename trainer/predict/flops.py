"""How large a recipe's model is, what a sequence leaves behind in it and what a token costs, counted without building it."""

from ...attention.patterns import Pattern
from ..recipe.layers.linear import ConvolutionBlock, LinearAttentionBlock, LinearDesign
from ..recipe.layers.softmax import Block, MoBABlock, SoftmaxBlock
from ..recipe.schema import ModelConfig


def padded_vocab_size(vocab_size: int) -> int:
    """The next multiple of 128: whatever the tensor-parallel size, the same model."""
    return -(-vocab_size // 128) * 128


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the whole model, with its padded vocabulary."""
    embeddings = (
        padded_vocab_size(vocab_size) * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    )
    layers = sum(_norms(model, block) + mlp_parameters(model, block) for block in model.stack)
    return (
        embeddings
        + layers
        + model.hidden_size
        + sum(mixer_parameters(model, layer) for layer in range(len(model.stack)))
    )


def mlp_parameters(model: ModelConfig, block: Block, per_token: bool = False) -> int:
    """Of the MLP of one layer, or of its experts and their router; ``per_token`` of those alone that a token goes through."""
    hidden, moe = model.hidden_size, model.moe
    if block.mlp == "dense":
        return 3 * hidden * model.intermediate_size
    experts = moe.num_experts_per_tok if per_token else moe.num_experts
    routed = (
        experts * 3 * hidden * (moe.intermediate_size or model.intermediate_size)
        + moe.num_experts * hidden
    )
    shared = 3 * hidden * (moe.shared_expert_intermediate_size or 0)
    return routed + shared + (hidden if moe.shared_expert_gate else 0)


def _norms(model: ModelConfig, block: Block) -> int:
    return {"pre": 2, "post": 2, "sandwich": 4, "reordered": 2}[block.norm] * model.hidden_size


def mixer_parameters(model: ModelConfig, layer: int) -> int:
    """Of the mixer of one layer (from 0)."""
    block, hidden, width = (
        model.stack[layer],
        model.hidden_size,
        model.num_attention_heads * model.kv_channels,
    )
    if isinstance(block, ConvolutionBlock):
        return 4 * width * hidden + width * block.conv_kernel
    if isinstance(block, LinearAttentionBlock):
        return _linear_parameters(hidden, block.design(model, layer))
    assert isinstance(block, SoftmaxBlock)
    projections = (
        (2 if block.output_gate else 1) * width + 2 * model.kv_heads * model.kv_channels + width
    )
    heads = model.num_attention_heads + model.kv_heads if block.qk_norm == "all" else 2
    norms = heads * model.kv_channels if block.qk_norm else 0
    return projections * hidden + norms + (model.num_attention_heads if block.attention_sink else 0)


def _linear_parameters(hidden: int, design: LinearDesign) -> int:
    heads, keys = design.heads, design.heads * design.key_dim
    total = (design.key_heads * sum(design.parts) + design.width) * hidden
    total += (
        design.conv_channels * (design.conv_kernel + design.conv_bias) if design.conv_kernel else 0
    )
    total += {"hedgehog": 2 * keys * design.key_dim, "lrpe": keys}.get(design.feature_map, 0)
    total += design.decay_rank * (hidden + keys) + design.gate_rank * (hidden + design.width)
    if design.decay in ("sigmoid", "softplus"):
        total += (keys if design.decay_rank else heads) + (
            heads if design.decay == "softplus" else 0
        )
    if design.norm != "none" and design.norm_weight:
        total += design.value_dim if design.norm == "head" else design.width
    return total + (heads if design.skip else 0)


def state_bytes(model: ModelConfig, length: int, layer: int | None = None, element: int = 4) -> int:
    """What ``length`` tokens of one sequence leave behind for the next one to read, of one layer or of all.

    Softmax attention keeps the keys and values that its last token sees, all of them where they are chosen from the content;
    linear attention a state; a convolution its last inputs. Each number takes ``element`` bytes.
    """
    if layer is None:
        return sum(state_bytes(model, length, each, element) for each in range(len(model.stack)))
    block = model.stack[layer]
    if isinstance(block, ConvolutionBlock):
        return (
            element
            * min(length, block.conv_kernel - 1)
            * model.num_attention_heads
            * model.kv_channels
        )
    if isinstance(block, LinearAttentionBlock):
        design = block.design(model, layer)
        state = design.heads * design.feature_dim * (design.value_dim + design.normalised)
        return element * (state + max(0, design.conv_kernel - 1) * design.conv_channels)
    assert isinstance(block, SoftmaxBlock)
    chosen = isinstance(block, MoBABlock)
    seen = (
        model.kv_heads * length
        if chosen
        else sum(_kept(model, block, length, head) for head in range(model.kv_heads))
    )
    return element * seen * 2 * model.kv_channels


def _kept(model: ModelConfig, block: SoftmaxBlock, length: int, head: int) -> int:
    """Of ``length`` keys those that its last query sees, or a later one within a period of the pattern."""
    pattern = block.attention_pattern(model.kv_heads)
    relative = [rule for rule in pattern.rules(head) if rule.relative]
    last = length + max((rule.block * rule.step for rule in relative), default=0)
    parts = (part.positions() for part in pattern.need(length - 1, last, head))
    return sum(int((positions < length).sum()) for positions in parts)


def flops_per_token(model: ModelConfig, length: int, layer: int) -> float:
    """Of the forward pass of a layer's mixer, a mean over a sequence; a multiplication and an addition are two."""
    block, width = model.stack[layer], model.num_attention_heads * model.kv_channels
    projections = 2.0 * mixer_parameters(model, layer)
    if isinstance(block, ConvolutionBlock):
        return projections
    if isinstance(block, LinearAttentionBlock):
        design = block.design(model, layer)
        state = design.heads * design.feature_dim * (design.value_dim + design.normalised)
        # Written and read; with the delta rule first recalled. Decays are a factor of the state.
        return projections + state * (2 * (3 if design.beta else 2) + (design.decay != "none"))
    assert isinstance(block, SoftmaxBlock)
    return projections + 4 * width * _pairs(model, block, length) / (model.kv_heads * length)


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


def _pairs(model: ModelConfig, block: SoftmaxBlock, length: int) -> int:
    """Of query and key that all KV heads show; blocks that are chosen from the content count as full."""
    pattern = block.attention_pattern(model.kv_heads)
    if isinstance(pattern, Pattern):
        return sum(pattern.visible_pairs(length, head) for head in range(model.kv_heads))
    most = min(length, pattern.top_k * pattern.block)
    return model.kv_heads * (most * (most + 1) // 2 + (length - most) * most)
