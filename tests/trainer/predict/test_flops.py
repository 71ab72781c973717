"""The state and FLOPs of a layer, against sums by hand for the tiny recipe.

Its width is 64 in 4 heads of 16, with 2 KV heads and 96 tokens.
"""

import pytest
from longspan.trainer.predict.flops import (
    flops_per_token,
    parameter_count,
    state_bytes,
    training_flops,
)
from longspan.trainer.recipe.file import load_recipe

PROJECTIONS = 2 * 64 * (64 + 2 * 32 + 64)
SIZES = {
    "{mixer: full}": (2 * 96 * 32 * 4, PROJECTIONS + 4 * 64 * 97 / 2),
    "{mixer: window, window: 10}": (2 * 10 * 32 * 4, PROJECTIONS + 4 * 64 * (55 + 86 * 10) / 96),
    # The last token sees 2 blocks of 8 in the band and 5 beyond it. Over both heads, a block of
    # queries sees its own block twice, the one before twice, and every earlier block once.
    "{mixer: s2, block: 8, local_blocks: 2, stride: 2}": (
        2 * 7 * 8 * 32 * 4,
        PROJECTIONS + 4 * 64 * (12 * 2 * 36 + 11 * 2 * 64 + 55 * 64) / (2 * 96),
    ),
    "{mixer: lightning}": (4 * 16 * 16 * 4, 2 * (5 * 64 * 64 + 64) + 4 * 16 * 16 * (2 + 2 + 1)),
    # Queries and keys of 2 x 12, values and gates of 4 x 24, betas and decays of 4.
    "{mixer: gated_deltanet, num_key_heads: 2}": (
        (4 * 12 * 24 + 3 * 144) * 4,
        2 * (64 * (144 + 96 + 4 + 4 + 96) + 4 * 144 + 4 + 4 + 24) + 4 * 12 * 24 * (2 + 2 + 2 + 1),
    ),
    # Queries and keys of 2 x 12, values and gates of 4 x 32, steps of 4; a bias in the
    # convolution, a skip for each head.
    "{mixer: mamba2, num_key_heads: 2, key_head_dim: 12}": (
        (4 * 12 * 32 + 3 * 176) * 4,
        2 * (64 * (176 + 128 + 4 + 128) + 5 * 176 + 4 + 4 + 128 + 4) + 4 * 12 * 32 * (2 + 2 + 1),
    ),
    # 1 + 8 + 36 features, and a column of values for the sum of the weights.
    "{mixer: based, key_head_dim: 8}": (
        4 * 45 * 17 * 4,
        2 * 64 * (4 * 32 + 64) + 4 * 45 * 17 * (2 + 2),
    ),
    "{mixer: conv}": (2 * 64 * 4, 2 * (4 * 64 * 64 + 3 * 64)),
}


@pytest.fixture
def model(tiny_recipe):
    """``model(block)``: the tiny recipe's, with that block as its last layer."""
    return lambda block: load_recipe(str(tiny_recipe), [f"model.layers.blocks.full={block}"]).model


@pytest.mark.parametrize(("block", "sizes"), SIZES.items())
def test_state_bytes_and_flops_of_a_layer(model, block, sizes):
    state, flops = sizes
    changed_model = model(block)
    assert state_bytes(changed_model, 96, 3) == state
    assert state_bytes(changed_model, 96, 3, element=2) == state / 2
    assert flops_per_token(changed_model, 96, 3) == pytest.approx(flops, rel=1e-12)
    assert state_bytes(changed_model, 96) == sum(
        state_bytes(changed_model, 96, layer) for layer in range(4)
    )
    later_state = state_bytes(changed_model, 192, 3)
    grows = "full" in block or "s2" in block
    assert (later_state > state) == grows, "a window, a state and a convolution stay as they are"
    assert grows or later_state == state


def test_training_flops_match_the_textbook(tiny_recipe):
    """A token costs ``6 N`` without the input embedding, plus attention: 12 layers x width x T.

    Causality halves the cost of attention; a window costs only the keys it shows.
    """
    dense = "model.layers={blocks: {full: {mixer: full}}, pattern: [full]}"
    model = load_recipe(str(tiny_recipe), [dense]).model
    norms = (2 * 4 + 1) * 64
    embedding = 384 * 64
    matrices = (
        parameter_count(model, 257) - norms - embedding * (1 if model.tie_word_embeddings else 2)
    )
    length = 96
    flops = training_flops(model, length, 257)
    assert flops["output"] == 6 * embedding
    assert flops["full"] == 6 * matrices + 12 * 4 * 64 * (length + 1) / 2
    mixed = (
        "model.layers={blocks: {full: {mixer: full}, near: {mixer: window, window: 8}}, "
        "pattern: [full, near, near, near]}"
    )
    visible_keys = sum(min(8, position + 1) for position in range(length)) / length
    near = training_flops(load_recipe(str(tiny_recipe), [mixed]).model, length, 257)["near"]
    assert near == pytest.approx(3 * (6 * matrices / 4 + 12 * 64 * visible_keys))
