"""The code exported with a model: its parameters, and kinds of layer with code of their own."""

import pytest
import torch
from longspan.trainer.huggingface.custom_target import CustomTarget, mixer_name
from longspan.trainer.huggingface.model_to_export import ModelToExport
from longspan.trainer.layers.convolution import ConvolutionBlock
from longspan.trainer.layers.registry import KINDS
from longspan.trainer.recipe.file import load_recipe

from .exported import stack

KEYS = {
    "s2": {"block": 8},  # the default does not divide the recipe's sequences
    "window": {"window": 9},
    "streaming": {"window": 9},
    "pattern": {"pattern": "Stripes(4, 6)"},
}
EXPORTED_KINDS = [kind.kind() for kind in KINDS if kind.kind() != "moba"]
CASES = {kind: {"mixer": kind, **KEYS.get(kind, {})} for kind in EXPORTED_KINDS}
CASES |= {
    "full, all options": {
        "mixer": "full",
        "norm": "sandwich",
        "qk_norm": True,
        "output_gate": True,
        "attention_sink": True,
    },
    "full, norm of all heads": {"mixer": "full", "norm": "reordered", "qk_norm": "all"},
    "lightning of TransNormerLLM": {"mixer": "lightning", "style": "transnormer"},
    "mamba2, several key heads": {"mixer": "mamba2", "num_key_heads": 2, "key_head_dim": 12},
    "gated_deltanet, fewer key heads": {"mixer": "gated_deltanet", "num_key_heads": 2},
    "gated_deltanet without convolution": {"mixer": "gated_deltanet", "conv_kernel": 0},
}


@pytest.mark.parametrize("block", CASES.values(), ids=CASES)
def test_exported_modules_have_the_shapes_of_parameter_shapes(tiny_recipe, block):
    recipe = load_recipe(str(tiny_recipe), [stack({"block": block})])
    target = CustomTarget(ModelToExport.of_recipe(recipe))
    hf_model = target.build({}, torch.float32)

    for layer, block in enumerate(target.stack):
        shapes = block.parameter_shapes(target.model, layer)
        expected = {mixer_name(block, name): shape for name, shape in shapes.items()}
        hf_parameters = hf_model.model.layers[layer].mixer.named_parameters()
        hf_shapes = {name: tuple(parameter.shape) for name, parameter in hf_parameters}
        assert hf_shapes == expected

    mapped_names = [name for tensor_map in target.tensor_maps() for name in tensor_map.hf_rows]
    assert sorted(mapped_names) == sorted(name for name, _ in hf_model.named_parameters())


class ShiftBlock(ConvolutionBlock):
    """A kind of layer that the exported code does not know."""

    def exported(self, model, layer):
        return {"kind": "shift", "weight": 0.25}

    def parameter_shapes(self, model, layer):
        width = model.hidden_size
        return {
            "linear_in.weight": (width, width),
            "linear_proj.weight": (width, width),
            "norm.weight": (width,),
        }

    def export_source(self):
        return '''"""A token and a part of the token before it."""

import torch
from torch import nn


class Mixer(nn.Module):
    def __init__(self, config, options):
        super().__init__()
        size = config.hidden_size
        self.weight = options["weight"]
        self.in_proj = nn.Linear(size, size, bias=False)
        self.out_proj = nn.Linear(size, size, bias=False)
        self.norm = nn.RMSNorm(size)

    def forward(self, hidden, positions, state):
        x = self.in_proj(hidden)
        earlier = torch.zeros_like(x[:, :1])
        if state is not None:
            earlier = state.get("last", earlier)
            state["last"] = x[:, -1:]
        shifted = torch.cat([earlier, x[:, :-1]], 1)
        return self.out_proj(self.norm(x + self.weight * shifted))
'''


def test_a_kind_of_layer_brings_its_own_code(tiny_recipe, tmp_path):
    """Such a layer stands beside one that the exported code knows; one call loads both."""
    from transformers import AutoModelForCausalLM

    model = load_recipe(str(tiny_recipe), [stack({"conv": {"mixer": "conv"}})]).model
    blocks = {"shift": ShiftBlock(mixer="conv"), **model.layers.blocks}
    layers = model.layers.model_construct(blocks=blocks, pattern=["shift", "conv"])
    to_export = ModelToExport(model.model_copy(update={"layers": layers}), 257, 96)
    target = CustomTarget(to_export)
    hf_model = target.build({}, torch.float32)

    mapped_names = [name for tensor_map in target.tensor_maps() for name in tensor_map.hf_rows]
    assert sorted(mapped_names) == sorted(name for name, _ in hf_model.named_parameters())

    generator = torch.Generator().manual_seed(6)
    weights = {
        name: torch.randn(parameter.shape, generator=generator) * 0.2
        for name, parameter in hf_model.named_parameters()
    }
    hf_model.load_state_dict(weights, strict=False, assign=True)
    hf_model.tie_weights()
    hf_model.save_pretrained(tmp_path)
    target.finish_folder(tmp_path)

    assert (tmp_path / "mixer_shift.py").is_file()

    tokens = torch.randint(257, (2, 20), generator=generator)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        expected = hf_model(tokens, use_cache=False).logits
        whole = loaded(tokens, use_cache=False).logits
        outputs = loaded(tokens[:, :12], use_cache=True)
        cached = loaded(tokens[:, 12:], past_key_values=outputs.past_key_values).logits

    assert torch.equal(whole, expected)
    assert torch.allclose(cached, whole[:, 12:], atol=1e-5)
