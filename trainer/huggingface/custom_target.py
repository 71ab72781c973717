"""Any stack, layer by layer as the recipe has it: a model whose code goes with it."""

import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..layers.base import Block
from ..recipe.schema import MoEConfig
from . import naming
from .naming import layer_parameter
from .target import Target
from .tensor_map import TensorMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NORMS = {
    "input_layernorm": "input_norm",
    "pre_mlp_layernorm": "mlp_norm",
    "post_mixer_layernorm": "mixer_output_norm",
    "post_mlp_layernorm": "mlp_output_norm",
}
_PROJECTIONS = {
    "linear_in.weight": "in_proj.weight",
    "linear_proj.weight": "out_proj.weight",
}
_MIXER_NAMES = _PROJECTIONS | {
    "q_layernorm.weight": "q_norm.weight",
    "k_layernorm.weight": "k_norm.weight",
    "norm.weight": "norm_weight",
    "decay.rate_log": "rate_log",
    "decay.bias": "decay_bias",
    "decay_in.down.weight": "decay_down.weight",
    "decay_in.up.weight": "decay_up.weight",
    "gate_in.down.weight": "gate_down.weight",
    "gate_in.up.weight": "gate_up.weight",
}
"""Parameters of mixers that have another name in ``modeling_longspan.py``."""


class CustomTarget(Target):
    """The architecture of :mod:`.custom.modeling_longspan`."""

    model_type = "longspan"
    ships_code = True

    def config(self) -> dict[str, Any]:
        return self.to_export.common_config() | {
            "layers": [self._layer_config(block, layer) for layer, block in enumerate(self.stack)],
            "moe": self._moe_config(),
            "rope_theta": self.model.rope_theta,
        }

    def _layer_config(self, block: Block, layer: int) -> dict[str, Any]:
        return {
            "norm": block.norm,
            "mixer_residual": list(block.mixer_residual),
            "mlp_residual": list(block.mlp_residual),
            "mlp": block.mlp,
            "mlp_activation": block.mlp_activation,
            "mixer": block.exported(self.model, layer),
        }

    def _moe_config(self) -> dict[str, Any] | None:
        moe = self.model.moe
        if moe is None:
            return None
        width = moe.intermediate_size or self.model.intermediate_size
        return {**moe.model_dump(), "intermediate_size": width}

    def tensor_maps(self) -> Iterator[TensorMap]:
        yield from naming.embeddings(self.model, self.to_export.vocab_size)
        for layer, block in enumerate(self.stack):
            for name in block.norm_names:
                yield layer_parameter(layer, f"{name}.weight", f"{_NORMS[name]}.weight")
            for name in block.parameter_shapes(self.model, layer):
                yield layer_parameter(layer, f"mixer.{name}", f"mixer.{mixer_name(block, name)}")
            yield from _mlp_maps(layer, self.model.moe if block.mlp == "moe" else None)

    def _maker(self, token_ids: dict[str, int | None]) -> "Callable[[], PreTrainedModel]":
        from .custom import modeling_longspan
        from .custom.configuration_longspan import LongspanConfig

        for kind, source in self._sources().items():
            module = types.ModuleType(f"mixer_{kind}")
            exec(source, module.__dict__)
            modeling_longspan.MIXERS[kind] = module.Mixer

        LongspanConfig.register_for_auto_class()
        modeling_longspan.LongspanForCausalLM.register_for_auto_class("AutoModelForCausalLM")
        config = LongspanConfig(**{**self.config(), **token_ids})
        return lambda: modeling_longspan.LongspanForCausalLM(config)

    def finish_folder(self, folder: Path) -> None:
        """Add the code of kinds of layer that bring their own to that of the model."""
        lines = []
        for kind, source in self._sources().items():
            (folder / f"mixer_{kind}.py").write_text(source)
            lines += ["", f"from .mixer_{kind} import Mixer", "", f'MIXERS["{kind}"] = Mixer']
        if lines:
            with (folder / "modeling_longspan.py").open("a") as file:
                file.write("\n".join([*lines, ""]))

    def _sources(self) -> dict[str, str]:
        """Return the code of kinds of layer that bring their own, by their word in the config."""
        sources = {}
        for layer, block in enumerate(self.stack):
            source = block.export_source()
            if source is not None:
                sources[block.exported(self.model, layer)["kind"]] = source
        return sources


def mixer_name(block: Block, name: str) -> str:
    """Return what the exported code calls the parameter ``name`` of a mixer."""
    names = _MIXER_NAMES if block.export_source() is None else _PROJECTIONS
    return names.get(name, name)


def _mlp_maps(layer: int, moe: MoEConfig | None) -> Iterator[TensorMap]:
    """Yield the maps of a layer's experts, or of its dense MLP if it has none."""
    if moe is None:
        yield from _one_mlp(layer, "mlp", "mlp")
        return
    for expert in range(moe.num_experts):
        yield from _one_mlp(layer, f"mlp.experts.local_experts.{expert}", f"mlp.experts.{expert}")
    yield layer_parameter(layer, "mlp.router.weight", "mlp.router.weight")
    if moe.shared_expert_intermediate_size:
        yield from _one_mlp(layer, "mlp.shared_experts", "mlp.shared")
        if moe.shared_expert_gate:
            yield layer_parameter(layer, "mlp.shared_experts.gate_weight", "mlp.shared_gate.weight")


def _one_mlp(layer: int, megatron_name: str, hf_name: str) -> Iterator[TensorMap]:
    for matrix, hf_matrix in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
        yield layer_parameter(
            layer, f"{megatron_name}.{matrix}.weight", f"{hf_name}.{hf_matrix}.weight"
        )
