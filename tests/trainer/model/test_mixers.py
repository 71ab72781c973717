"""Linear mixers against the modules of transformers with the same weights, or papers' formulas.

Both sides compute in fp64 where they normally use fp32, so that a wrong epsilon, scale or decay
shows.
"""

import functools
import itertools

import pytest
import torch
from longspan.launch.process import process_group
from longspan.parallel import Layout, Sequence
from longspan.trainer.recipe.check import check_recipe
from torch.overrides import TorchFunctionMode

from . import mixer_oracles

HIDDEN = 32
HEADS = 4
LAYERS = 3
EPS = 1e-5


class AllInFp64(TorchFunctionMode):
    """Replace fp32 by fp64 in every call of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(x):
            return torch.float64 if x is torch.float32 else x

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})

    def __enter__(self):
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def build():
    """``build(block, layer=0, eps=EPS)`` returns a layer of such blocks and the recipe's model."""
    from longspan.trainer.model.cpu import megatron_on_cpu
    from longspan.trainer.model.model import build_model
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    def build_layer(block, layer=0, eps=EPS):
        model = {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": 48,
        }
        content = {
            "run_dir": "none",
            "model": {
                **model,
                "rms_norm_eps": eps,
                "layers": {"blocks": {"it": block}, "pattern": ["it"]},
            },
            "data": {"sources": {"none": 1.0}},
            "training": {"steps": 1, "seq_length": 8, "global_batch_size": 1},
            "optimizer": {"lr": 1e-3},
        }
        recipe = check_recipe(content, "test")
        layer_module = build_model(recipe, 128, torch.float64).decoder.layers[layer]
        randomize_parameters(layer_module)
        shapes = {name: tuple(value.shape) for name, value in layer_module.mixer.named_parameters()}
        assert recipe.model.stack[layer].parameter_shapes(recipe.model, layer) == shapes
        return layer_module, recipe.model

    with AllInFp64(), process_group(2), megatron_on_cpu():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
        yield build_layer
        parallel_state.destroy_model_parallel()


@torch.no_grad()
def randomize_parameters(module):
    """Set all parameters to random values, of both signs where the parameter allows it."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        low = 0.5
        high = 1.5
        if name.endswith(("dt_bias", "A_log", "bias", "rate_log", "D", "skip")):
            low = -1.5
            high = 1.0
        elif parameter.ndim > 1 and "angles" not in name:
            high = 3**0.5 * (2.0 if "conv" in name else 1.5 * parameter[0].numel() ** -0.5)
            low = -high
        parameter.copy_(torch.rand(parameter.shape, generator=generator) * (high - low) + low)


STARTS = [[0, 97, 150], [0, 40, 150]]


def packed_inputs():
    """Return inputs ``[batch, time, hidden]`` of two documents in each row, and their Sequence."""
    x = torch.randn(2, 150, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    documents = torch.stack(
        [torch.repeat_interleave(torch.arange(2), torch.tensor(row).diff()) for row in STARTS]
    )
    return x, Sequence(Layout.contiguous(150), 0, documents.to(torch.int32))


def per_document(x, mix):
    """Apply ``mix`` to each document ``[1, tokens, hidden]`` by itself."""
    rows = [
        [mix(x[i : i + 1, a:b]) for a, b in itertools.pairwise(row)] for i, row in enumerate(STARTS)
    ]
    return torch.cat([torch.cat(row, 1) for row in rows])


def assert_close(ours, expected, what, tolerance=1e-10):
    assert ours.shape == expected.shape, what
    assert expected.norm() > 0, what
    assert (ours - expected).norm() <= tolerance * expected.norm(), (
        what,
        float((ours - expected).norm() / expected.norm()),
    )


def assert_matches(ours, theirs, layout, call=None):
    """Compare outputs and gradients; ``layout`` converts their weights or gradients to ours."""
    randomize_parameters(theirs)
    expected = layout(dict(theirs.named_parameters()))
    assert expected.keys() == dict(ours.named_parameters()).keys()
    ours.load_state_dict(expected)
    x, sequence = packed_inputs()
    output = per_document(x, call or theirs)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    output.backward(upstream)
    gradients = {
        "x": x.grad,
        **layout({name: parameter.grad for name, parameter in theirs.named_parameters()}),
    }
    x.grad = None
    out = ours(x.transpose(0, 1), sequence).transpose(0, 1)
    assert_close(out, output, "output")
    out.backward(upstream)
    for name, parameter in [("x", x), *ours.named_parameters()]:
        assert_close(parameter.grad, gradients[name], name)


def interleave_heads(heads, *parts):
    """Interleave the rows of several matrices head by head."""
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 1)


@pytest.mark.parametrize("layer", [0, 1])
def test_lightning_matches_minimax(build, layer):
    from transformers.models.minimax.modeling_minimax import (
        MiniMaxConfig,
        MiniMaxLightningAttention,
    )

    kinds = ["linear_attention"] * LAYERS
    sizes = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "block_size": 64,
    }
    theirs = MiniMaxLightningAttention(MiniMaxConfig(**sizes, layer_types=kinds), layer)

    def layout(w):
        return {
            "linear_in.weight": interleave_heads(
                HEADS, w["qkv_proj.weight"], w["output_gate.weight"]
            ),
            "norm.weight": w["norm.weight"],
            "linear_proj.weight": w["out_proj.weight"],
        }

    ours, _ = build({"mixer": "lightning"}, layer, eps=1e-6)
    assert_matches(ours.mixer, theirs, layout, lambda x: theirs(x, None, None)[0])


def delta_net(key_heads, key_dim, value_heads, value_dim):
    kinds = {"layer_types": ["linear_attention", "full_attention"]}
    sizes = {
        "linear_num_key_heads": key_heads,
        "linear_key_head_dim": key_dim,
        "linear_conv_kernel_dim": 4,
    }
    sizes |= {"linear_num_value_heads": value_heads, "linear_value_head_dim": value_dim}
    return {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 2,
        "rms_norm_eps": EPS,
        **kinds,
        **sizes,
    }


def convolution_by_heads(conv, heads, *sizes):
    """Reorder a convolution's channels from queries, keys and values to head by head."""
    return interleave_heads(heads, *conv.squeeze(1).split(sizes))


def test_gated_deltanet_matches_qwen3_next(build):
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        Qwen3NextConfig,
        Qwen3NextGatedDeltaNet,
    )

    theirs = Qwen3NextGatedDeltaNet(Qwen3NextConfig(**delta_net(2, 8, 4, 16)), 0)

    def layout(w):
        return {
            "linear_in.weight": interleave_heads(
                2, w["in_proj_qkvz.weight"], w["in_proj_ba.weight"]
            ),
            "conv_weight": convolution_by_heads(w["conv1d.weight"], 2, 16, 16, 64),
            "decay.rate_log": w["A_log"],
            "decay.bias": w["dt_bias"],
            "norm.weight": w["norm.weight"],
            "linear_proj.weight": w["out_proj.weight"],
        }

    ours, _ = build(
        {"mixer": "gated_deltanet", "num_key_heads": 2, "key_head_dim": 8, "value_head_dim": 16}
    )
    assert_matches(ours.mixer, theirs, layout)


def test_gated_deltanet_matches_qwen3_5(build):
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5TextConfig

    theirs = Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(**delta_net(2, 6, 6, 8)), 0)

    def layout(w):
        q, k, v = w["in_proj_qkv.weight"].split([12, 12, 48])
        return {
            "linear_in.weight": interleave_heads(
                2, q, k, v, w["in_proj_z.weight"], w["in_proj_b.weight"], w["in_proj_a.weight"]
            ),
            "conv_weight": convolution_by_heads(w["conv1d.weight"], 2, 12, 12, 48),
            "decay.rate_log": w["A_log"],
            "decay.bias": w["dt_bias"],
            "norm.weight": w["norm.weight"],
            "linear_proj.weight": w["out_proj.weight"],
        }

    sizes = {"num_heads": 6, "num_key_heads": 2, "key_head_dim": 6, "value_head_dim": 8}
    ours, _ = build({"mixer": "gated_deltanet", **sizes})
    assert_matches(ours.mixer, theirs, layout)


@pytest.mark.parametrize("negative", [True, False])
def test_gated_deltanet_matches_olmo_hybrid(build, negative):
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import (
        OlmoHybridConfig,
        OlmoHybridGatedDeltaNet,
    )

    theirs = OlmoHybridGatedDeltaNet(
        OlmoHybridConfig(**delta_net(4, 6, 4, 12), linear_allow_neg_eigval=negative), 0
    )

    def layout(w):
        rows = [w[f"{name}_proj.weight"] for name in "qkvgba"]
        return {
            "linear_in.weight": interleave_heads(4, *rows),
            "conv_weight": convolution_by_heads(w["conv1d.weight"], 4, 24, 24, 48),
            "decay.rate_log": w["A_log"],
            "decay.bias": w["dt_bias"],
            "norm.weight": w["o_norm.weight"],
            "linear_proj.weight": w["o_proj.weight"],
        }

    ours, _ = build({"mixer": "gated_deltanet", "allow_negative_eigenvalues": negative})
    assert_matches(ours.mixer, theirs, layout)


def test_kda_matches_kimi_linear(build):
    from transformers.models.kimi_linear.modeling_kimi_linear import (
        KimiLinearConfig,
        KimiLinearDeltaAttention,
    )

    sizes = {
        "linear_head_dim": 8,
        "linear_num_heads": HEADS,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 2,
    }
    config = KimiLinearConfig(hidden_size=HIDDEN, rms_norm_eps=EPS, **sizes)
    theirs = KimiLinearDeltaAttention(config, 0)

    def layout(w):
        rows = [w[f"{name}_proj.weight"] for name in "qkvb"]
        return {
            "linear_in.weight": interleave_heads(HEADS, *rows),
            "conv_weight": convolution_by_heads(w["conv1d.weight"], HEADS, 32, 32, 32),
            "decay.rate_log": w["forget_gate.A_log"].flatten(),
            "decay.bias": w["forget_gate.dt_bias"],
            "decay_in.down.weight": w["forget_gate.f_a_proj.weight"],
            "decay_in.up.weight": w["forget_gate.f_b_proj.weight"],
            "gate_in.down.weight": w["g_a_proj.weight"],
            "gate_in.up.weight": w["g_b_proj.weight"],
            "norm.weight": w["o_norm.weight"],
            "linear_proj.weight": w["o_proj.weight"],
        }

    ours, _ = build({"mixer": "kda"})
    assert_matches(ours.mixer, theirs, layout)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_matches_granite(build, groups):
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
        GraniteMoeHybridConfig,
        GraniteMoeHybridMambaLayer,
    )

    sizes = {
        "mamba_n_heads": HEADS,
        "mamba_d_state": 12,
        "mamba_n_groups": groups,
        "mamba_chunk_size": 64,
    }
    config = GraniteMoeHybridConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, rms_norm_eps=EPS, **sizes
    )
    theirs = GraniteMoeHybridMambaLayer(config, 0)

    def channels(x):
        values, b, c = x.split([64, 12 * groups, 12 * groups])
        return c, b, values

    def layout(w):
        gate, mixed, step = w["in_proj.weight"].split([64, 64 + 24 * groups, HEADS])
        return {
            "linear_in.weight": interleave_heads(groups, *channels(mixed), gate, step),
            "conv_weight": interleave_heads(groups, *channels(w["conv1d.weight"].squeeze(1))),
            "conv_bias": interleave_heads(groups, *channels(w["conv1d.bias"])),
            "decay.rate_log": w["A_log"],
            "decay.bias": w["dt_bias"],
            "skip": w["D"],
            "norm.weight": w["norm.weight"],
            "linear_proj.weight": w["out_proj.weight"],
        }

    ours, _ = build({"mixer": "mamba2", "key_head_dim": 12, "num_key_heads": groups})
    assert_matches(ours.mixer, theirs, layout)


def test_conv_matches_lfm2(build):
    from transformers.models.lfm2.modeling_lfm2 import Lfm2Config, Lfm2ShortConv

    config = Lfm2Config(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_hidden_layers=1, layer_types=["conv"]
    )
    theirs = Lfm2ShortConv(config, 0)

    def layout(w):
        return {
            "linear_in.weight": interleave_heads(HEADS, *w["in_proj.weight"].chunk(3)),
            "conv_weight": w["conv.weight"].squeeze(1),
            "linear_proj.weight": w["out_proj.weight"],
        }

    ours, _ = build({"mixer": "conv"})
    assert_matches(ours.mixer, theirs, layout)


FORMULAS = {
    "linear": ({"mixer": "linear"}, mixer_oracles.linear, 0),
    "lightning, the paper's decay": (
        {"mixer": "lightning", "decay": "paper"},
        mixer_oracles.lightning_paper,
        1,
    ),
    "transnormer": ({"mixer": "lightning", "style": "transnormer"}, mixer_oracles.transnormer, 0),
    "transnormer, later": (
        {"mixer": "lightning", "style": "transnormer"},
        mixer_oracles.transnormer,
        1,
    ),
    "retention": ({"mixer": "retention"}, mixer_oracles.retention, 0),
    "simple_gla": ({"mixer": "simple_gla"}, mixer_oracles.simple_gla, 0),
    "gla": ({"mixer": "gla", "decay_rank": 3}, mixer_oracles.gla, 0),
    "based": ({"mixer": "based"}, mixer_oracles.based, 0),
    "hedgehog": ({"mixer": "hedgehog"}, mixer_oracles.hedgehog, 0),
    "deltanet": ({"mixer": "deltanet"}, mixer_oracles.deltanet, 0),
    "deltanet, no conv": ({"mixer": "deltanet", "conv_kernel": 0}, mixer_oracles.deltanet, 0),
    "deltanet, negative eigenvalues": (
        {"mixer": "deltanet", "allow_negative_eigenvalues": True},
        functools.partial(mixer_oracles.deltanet, beta_scale=2),
        0,
    ),
    "conv": ({"mixer": "conv", "conv_kernel": 5}, mixer_oracles.convolution, 0),
}


@pytest.mark.parametrize(("block", "formula", "layer"), FORMULAS.values(), ids=FORMULAS)
def test_mixers_match_their_papers_formulas(build, block, formula, layer):
    layer_module, model = build(block, layer)
    weights = dict(layer_module.mixer.named_parameters())
    x, sequence = packed_inputs()
    out = layer_module.mixer(x.transpose(0, 1), sequence).transpose(0, 1)
    expected = per_document(x, lambda piece: formula(piece[0], weights, model, layer)[None])
    assert_close(out, expected, "output")
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    inputs = {"x": x, **weights}
    our_grads, expected_grads = (
        torch.autograd.grad(y, list(inputs.values()), upstream) for y in (out, expected)
    )
    for name, ours, theirs in zip(inputs, our_grads, expected_grads, strict=True):
        assert_close(ours, theirs, name)


def test_an_mlp_without_activation(build):
    """TransNormerLLM's SGLU."""
    layer_module, _ = build({"mixer": "linear", "mlp_activation": "identity"})
    x, _ = packed_inputs()
    gate, up = (x @ layer_module.mlp.linear_fc1.weight.T).chunk(2, -1)
    assert_close(
        layer_module.mlp(x)[0], (gate * up) @ layer_module.mlp.linear_fc2.weight.T, "output"
    )
