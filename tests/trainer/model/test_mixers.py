"""Linear mixers against transformers' own modules with the same weights, and papers' formulas.

Both sides compute in fp64 wherever they would in fp32, so that a wrong epsilon, scale or decay
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

HIDDEN, HEADS, LAYERS, EPS = 32, 4, 3, 1e-5


class AllInFp64(TorchFunctionMode):
    """What asks for fp32 gets fp64."""

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
    """``build(block, layer=0, eps=EPS)``: that layer of a model of such blocks, and the model."""
    from longspan.trainer.model.cpu import megatron_on_cpu
    from longspan.trainer.model.model import build_model
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    def made(block, layer=0, eps=EPS):
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
        built = build_model(recipe, 128, torch.float64).decoder.layers[layer]
        scatter(built)
        shapes = {name: tuple(value.shape) for name, value in built.mixer.named_parameters()}
        assert recipe.model.stack[layer].parameter_shapes(recipe.model, layer) == shapes
        return built, recipe.model

    with AllInFp64(), process_group(2), megatron_on_cpu():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
        yield made
        parallel_state.destroy_model_parallel()


@torch.no_grad()
def scatter(module):
    """Values that no parameter begins with, of both signs where it may have them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        low, high = 0.5, 1.5
        if name.endswith(("dt_bias", "A_log", "bias", "rate_log", "D", "skip")):
            low, high = -1.5, 1.0
        elif parameter.ndim > 1 and "angles" not in name:
            high = 3**0.5 * (2.0 if "conv" in name else 1.5 * parameter[0].numel() ** -0.5)
            low = -high
        parameter.copy_(torch.rand(parameter.shape, generator=generator) * (high - low) + low)


STARTS = [[0, 97, 150], [0, 40, 150]]


def packed():
    """Two rows of two documents each: inputs [batch, time, hidden], and their sequence."""
    x = torch.randn(2, 150, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    documents = torch.stack(
        [torch.repeat_interleave(torch.arange(2), torch.tensor(row).diff()) for row in STARTS]
    )
    return x, Sequence(Layout.contiguous(150), 0, documents.to(torch.int32))


def one_by_one(x, mix):
    """``mix`` of each document [1, tokens, hidden] on its own."""
    rows = [
        [mix(x[i : i + 1, a:b]) for a, b in itertools.pairwise(row)] for i, row in enumerate(STARTS)
    ]
    return torch.cat([torch.cat(row, 1) for row in rows])


def assert_close(ours, expected, what, bar=1e-10):
    assert ours.shape == expected.shape, what
    assert expected.norm() > 0, what
    assert (ours - expected).norm() <= bar * expected.norm(), (
        what,
        float((ours - expected).norm() / expected.norm()),
    )


def assert_is_theirs(ours, theirs, layout, call=None):
    """Compare outputs and gradients; ``layout`` turns their weights or gradients into ours."""
    scatter(theirs)
    expected = layout(dict(theirs.named_parameters()))
    assert expected.keys() == dict(ours.named_parameters()).keys()
    ours.load_state_dict(expected)
    x, sequence = packed()
    output = one_by_one(x, call or theirs)
    toward = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    output.backward(toward)
    gradients = {
        "x": x.grad,
        **layout({name: parameter.grad for name, parameter in theirs.named_parameters()}),
    }
    x.grad = None
    out = ours(x.transpose(0, 1), sequence).transpose(0, 1)
    assert_close(out, output, "output")
    out.backward(toward)
    for name, parameter in [("x", x), *ours.named_parameters()]:
        assert_close(parameter.grad, gradients[name], name)


def fused(heads, *parts):
    """Rows of several matrices, each laid out by heads, brought together head by head."""
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 1)


@pytest.mark.parametrize("layer", [0, 1])
def test_lightning_is_minimax(build, layer):
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
            "linear_in.weight": fused(HEADS, w["qkv_proj.weight"], w["output_gate.weight"]),
            "norm.weight": w["norm.weight"],
            "linear_proj.weight": w["out_proj.weight"],
        }

    ours, _ = build({"mixer": "lightning"}, layer, eps=1e-6)
    assert_is_theirs(ours.mixer, theirs, layout, lambda x: theirs(x, None, None)[0])


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


def by_heads(conv, heads, *sizes):
    """A convolution's channels, from queries, keys and values to head by head."""
    return fused(heads, *conv.squeeze(1).split(sizes))


def test_gated_deltanet_is_qwen3_next(build):
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        Qwen3NextConfig,
        Qwen3NextGatedDeltaNet,
    )

    theirs = Qwen3NextGatedDeltaNet(Qwen3NextConfig(**delta_net(2, 8, 4, 16)), 0)

    def layout(w):
        return {
            "linear_in.weight": fused(2, w["in_proj_qkvz.weight"], w["in_proj_ba.weight"]),
            "conv_weight": by_heads(w["conv1d.weight"], 2, 16, 16, 64),
            "decay.rate_log": w["A_log"],
            "decay.bias": w["dt_bias"],
            "norm.weight": w["norm.weight"],
            "linear_proj.weight": w["out_proj.weight"],
        }

    ours, _ = build(
        {"mixer": "gated_deltanet", "num_key_heads": 2, "key_head_dim": 8, "value_head_dim": 16}
    )
    assert_is_theirs(ours.mixer, theirs, layout)


def test_gated_deltanet_is_qwen3_5(build):
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5TextConfig

    theirs = Qwen3_5GatedDeltaNet(Qwen3_5TextConfig(**delta_net(2, 6, 6, 8)), 0)

    def layout(w):
        q, k, v = w["in_proj_qkv.weight"].split([12, 12, 48])
        return {
            "linear_in.weight": fused(
                2, q, k, v, w["in_proj_z.weight"], w["in_proj_b.weight"], w["in_proj_a.weight"]
            ),
            "conv_weight": by_heads(w["conv1d.weight"], 2, 12, 12, 48),
            "decay.rate_log": w["A_log"],
            "decay.bias": w["dt_bias"],
            "norm.weight": w["norm.weight"],
            "linear_proj.weight": w["out_proj.weight"],
        }

    sizes = {"num_heads": 6, "num_key_heads": 2, "key_head_dim": 6, "value_head_dim": 8}
    ours, _ = build({"mixer": "gated_deltanet", **sizes})
    assert_is_theirs(ours.mixer, theirs, layout)


@pytest.mark.parametrize("negative", [True, False])
def test_gated_deltanet_is_olmo_hybrid(build, negative):
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
            "linear_in.weight": fused(4, *rows),
            "conv_weight": by_heads(w["conv1d.weight"], 4, 24, 24, 48),
            "decay.rate_log": w["A_log"],
            "decay.bias": w["dt_bias"],
            "norm.weight": w["o_norm.weight"],
            "linear_proj.weight": w["o_proj.weight"],
        }

    ours, _ = build({"mixer": "gated_deltanet", "allow_negative_eigenvalues": negative})
    assert_is_theirs(ours.mixer, theirs, layout)


def test_kda_is_kimi_linear(build):
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
            "linear_in.weight": fused(HEADS, *rows),
            "conv_weight": by_heads(w["conv1d.weight"], HEADS, 32, 32, 32),
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
    assert_is_theirs(ours.mixer, theirs, layout)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_granites(build, groups):
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
            "linear_in.weight": fused(groups, *channels(mixed), gate, step),
            "conv_weight": fused(groups, *channels(w["conv1d.weight"].squeeze(1))),
            "conv_bias": fused(groups, *channels(w["conv1d.bias"])),
            "decay.rate_log": w["A_log"],
            "decay.bias": w["dt_bias"],
            "skip": w["D"],
            "norm.weight": w["norm.weight"],
            "linear_proj.weight": w["out_proj.weight"],
        }

    ours, _ = build({"mixer": "mamba2", "key_head_dim": 12, "num_key_heads": groups})
    assert_is_theirs(ours.mixer, theirs, layout)


def test_conv_is_lfm2(build):
    from transformers.models.lfm2.modeling_lfm2 import Lfm2Config, Lfm2ShortConv

    config = Lfm2Config(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_hidden_layers=1, layer_types=["conv"]
    )
    theirs = Lfm2ShortConv(config, 0)

    def layout(w):
        return {
            "linear_in.weight": fused(HEADS, *w["in_proj.weight"].chunk(3)),
            "conv_weight": w["conv.weight"].squeeze(1),
            "linear_proj.weight": w["out_proj.weight"],
        }

    ours, _ = build({"mixer": "conv"})
    assert_is_theirs(ours.mixer, theirs, layout)


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
        functools.partial(mixer_oracles.deltanet, most=2),
        0,
    ),
    "conv": ({"mixer": "conv", "conv_kernel": 5}, mixer_oracles.convolution, 0),
}


@pytest.mark.parametrize(("block", "formula", "layer"), FORMULAS.values(), ids=FORMULAS)
def test_mixers_are_their_papers_formulas(build, block, formula, layer):
    built, model = build(block, layer)
    weights = dict(built.mixer.named_parameters())
    x, sequence = packed()
    out = built.mixer(x.transpose(0, 1), sequence).transpose(0, 1)
    expected = one_by_one(x, lambda piece: formula(piece[0], weights, model, layer)[None])
    assert_close(out, expected, "output")
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    names, parameters = ["x", *weights], [x, *weights.values()]
    ours, theirs = (torch.autograd.grad(y, parameters, toward) for y in (out, expected))
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert_close(one, other, name)


def test_an_mlp_without_activation(build):
    """TransNormerLLM's SGLU."""
    built, _ = build({"mixer": "linear", "mlp_activation": "identity"})
    x, _ = packed()
    gate, up = (x @ built.mlp.linear_fc1.weight.T).chunk(2, -1)
    assert_close(built.mlp(x)[0], (gate * up) @ built.mlp.linear_fc2.weight.T, "output")
