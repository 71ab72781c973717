"""Rotary positions far into a sequence, here and in exported models."""

import pytest
import torch
from longspan.attention import rotary_tables
from longspan.trainer.huggingface.custom import modeling_longspan
from longspan.trainer.huggingface.exact_angles import use_exact_angles

DIM = 128


def exact_tables(positions, theta):
    frequencies = theta ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    angles = positions[..., None].double() * frequencies
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e7])
@pytest.mark.parametrize("last", [1024, 131_072, 1_048_576, 4_194_304])
def test_tables_are_exact_at_any_position(theta, last):
    positions = torch.arange(last - 256, last)
    for found, exact in zip(
        rotary_tables(positions, DIM, theta), exact_tables(positions, theta), strict=True
    ):
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() < 6e-8


def test_the_exported_code_has_the_same():
    positions = torch.arange(1_048_000, 1_048_256)[None]
    x = torch.ones(1, 256, 1, DIM)
    cos, sin = rotary_tables(positions, DIM, 5e5)
    expected = torch.cat([cos - sin, cos + sin], -1)[:, :, None]
    assert torch.allclose(modeling_longspan.rotated(x, positions, DIM, 5e5), expected, atol=1e-6)


def llama(theta):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=DIM,
            num_attention_heads=1,
            head_dim=DIM,
            num_hidden_layers=1,
            intermediate_size=8,
            vocab_size=8,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    )


@pytest.mark.parametrize("last", [1024, 131_072, 1_048_576])
def test_the_check_leaves_out_the_rounding_of_transformers(last):
    model = llama(5e5)
    positions = torch.arange(last - 256, last)[None]
    rotary = model.model.rotary_emb
    exact = torch.cat([exact_tables(positions, 5e5)[0]] * 2, -1)
    rounded = rotary(torch.zeros(1), positions)[0]
    assert 1e-5 < (rounded - exact).abs().max() < 8e-8 * last  # what docs/exporting.md says

    use_exact_angles(model)
    assert (rotary(torch.zeros(1), positions)[0] - exact).abs().max() < 6e-8


def test_the_check_leaves_other_faults():
    """A frequency that is off by a thousandth is no rounding."""
    model = llama(5e5)
    rotary = model.model.rotary_emb
    rotary.inv_freq[3] *= 1.001
    positions = torch.arange(1024)[None]
    wrong = rotary(torch.zeros(1), positions)[0]
    use_exact_angles(model)
    assert torch.equal(rotary(torch.zeros(1), positions)[0], wrong)
