"""The architectures of ``transformers`` that a recipe's model may be exactly: what each asks of a stack, its config, and where
its tensors lie in ours. Facts of transformers 5.23.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, ClassVar

from ...attention.patterns import Causal, Window
from ..layers.base import Block
from ..layers.linear import GatedDeltaNetBlock, LightningBlock, LinearDesign, Mamba2Block
from ..layers.softmax import SoftmaxBlock
from ..recipe.schema import ModelConfig
from . import naming
from .tensor_map import TensorMap

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

Misfits = Iterator[str]

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)


@dataclass(frozen=True)
class ModelToExport:
    """What is exported."""

    model: ModelConfig
    vocab_size: int
    """Without the padding."""
    seq_length: int

    def config(self) -> dict:
        """What the configs of all targets have, under the same names."""
        model = self.model
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.intermediate_size,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.kv_channels,
            "max_position_embeddings": self.seq_length,
            "rms_norm_eps": model.rms_norm_eps,
            "initializer_range": model.initializer_range,
            "tie_word_embeddings": model.tie_word_embeddings,
        }


class NativeTarget(ABC):
    """One architecture, for a source's model."""

    model_type: ClassVar[str]
    kinds: ClassVar[set[str]]
    """Of :func:`kind`, what its layers may be."""
    linear_types: ClassVar[dict[str, str]] = {}
    """What ``layer_types`` calls kinds other than full and window."""
    qk_norm: ClassVar[bool | str] = False
    output_gate: ClassVar[bool] = False
    shift: ClassVar[float] = 0.0
    """Its norms' weights are ours and this."""

    def __init__(self, source: ModelToExport):
        self.source, self.model = source, source.model
        self.stack = self.model.stack
        self.kinds_here = [kind(block, self.model) for block in self.stack]

    @abstractmethod
    def misfits(self) -> Misfits:
        """Why the model is not exactly this: one reason after another."""

    def rows(self) -> Iterator[TensorMap]:
        """All parameters, layer by layer; of a model that is not exactly this, those that both have."""
        yield from naming.ends(self.model, self.source.vocab_size, self.shift)
        for layer, block in enumerate(self.stack):
            yield from self.norm_rows(layer, block)
            yield from (
                self.softmax_rows(layer, block)
                if isinstance(block, SoftmaxBlock)
                else self.linear_rows(layer, block)
            )
            yield from self.mlp_rows(layer, block)

    def norm_rows(self, layer: int, block: Block) -> Iterator[TensorMap]:
        if block.norm != "reordered":
            yield from naming.norms(
                layer, "input_layernorm", "post_attention_layernorm", self.shift
            )

    def softmax_rows(self, layer: int, block: SoftmaxBlock) -> Iterator[TensorMap]:
        yield from naming.softmax(
            self.model, layer, block.output_gate, theirs_gated=self.output_gate
        )
        if self.qk_norm and block.qk_norm == self.qk_norm:
            yield from naming.qk_norms(
                layer, "norm" if self.qk_norm == "all" else "layernorm", self.shift
            )

    def linear_rows(self, layer: int, block: Block) -> Iterator[TensorMap]:
        """Of its mixers that are no softmax attention; none of those that it has not."""
        return iter(())

    def mlp_rows(self, layer: int, block: Block) -> Iterator[TensorMap]:
        if block.mlp == "dense":
            yield from naming.mlp(self.model, layer)

    def config(self) -> dict:
        """What ``AutoConfig`` makes its config of, but for the tokenizer's ids."""
        return self.source.config() | {
            "num_hidden_layers": self.model.num_hidden_layers,
            "intermediate_size": self.mlp_width,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.model.rope_theta},
        }

    def sizes(self) -> dict[str, int]:
        """What its config must say for its weights to be those of the model."""
        ours = NativeTarget.config(self)
        return {key: ours[key] for key in _SIZES}

    @property
    def fixed(self) -> dict:
        """Keys of its config that only these values of a recipe can express."""
        return {}

    def block_keys(self, config: "PreTrainedConfig", layer: int) -> dict:
        """What ``config`` says of keys of a layer's block."""
        rotary = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        return {"rotary_fraction": rotary, "mixer_residual": (1.0, 1.0), "mlp_residual": (1.0, 1.0)}

    def idle(self, name: str) -> bool:
        """Whether a tensor of theirs changes nothing."""
        return False

    def finish(self, built: "nn.Module") -> None:
        """Set what the model keeps that is no parameter of ours."""
        return

    @property
    def mlp_width(self) -> int:
        return self.model.intermediate_size

    @property
    def layer_types(self) -> list[str]:
        names = {"full": "full_attention", "window": "sliding_attention", **self.linear_types}
        return [names[kind] for kind in self.kinds_here]

    def blocks(self, *kinds: str) -> list[Block]:
        return [
            block for block, kind in zip(self.stack, self.kinds_here, strict=True) if kind in kinds
        ]

    def _plain_layers(
        self, norm: str, blocks: list[Block] | None = None, moe: bool = False
    ) -> Misfits:
        for block in self.stack if blocks is None else blocks:
            if block.norm != norm:
                yield f"norm: {block.norm}"
            if norm != "post" and (block.mixer_residual, block.mlp_residual) != (
                (1.0, 1.0),
                (1.0, 1.0),
            ):
                yield "mixer_residual or mlp_residual"
            if block.mlp_activation != "silu":
                yield f"mlp_activation: {block.mlp_activation}"
            if block.mlp == "moe" and not moe:
                yield "mlp: moe"

    def _softmax(self, rotary: float | None = 1.0) -> Misfits:
        """``rotary``: the share that is rotated; None for any, the same in all layers."""
        blocks = self.blocks("full", "window")
        for block in blocks:
            if block.qk_norm != self.qk_norm:
                yield f"qk_norm: {str(block.qk_norm).lower()}"
            if block.output_gate != self.output_gate:
                yield f"output_gate: {str(block.output_gate).lower()}"
            if block.softcap or block.attention_sink:
                yield "softcap or attention_sink"
            if block.rotary_fraction != (blocks[0].rotary_fraction if rotary is None else rotary):
                yield f"rotary_fraction: {block.rotary_fraction:g}"

    def _one_window(self) -> Misfits:
        if len({self.window(block) for block in self.blocks("window")}) > 1:
            yield "windows of several lengths"

    def window(self, block: SoftmaxBlock) -> int:
        return block.attention_pattern(self.model.kv_heads).tokens


class LlamaLike(NativeTarget):
    """Softmax layers before which a norm stands, and a dense MLP."""

    def misfits(self) -> Misfits:
        yield from self._plain_layers("pre")
        yield from self._softmax()
        yield from self._one_window()


class Llama(LlamaLike):
    model_type, kinds = "llama", {"full"}


class Mistral(LlamaLike):
    model_type, kinds = "mistral", {"window"}

    def config(self) -> dict:
        return super().config() | {"sliding_window": self.window(self.stack[0])}


class Ministral(LlamaLike):
    model_type, kinds = "ministral", {"full", "window"}

    def config(self) -> dict:
        windows = self.blocks("window")
        window = self.window(windows[0]) if windows else None
        return super().config() | {"sliding_window": window, "layer_types": self.layer_types}


class Qwen3(LlamaLike):
    model_type, kinds, qk_norm = "qwen3", {"full", "window"}, True

    def config(self) -> dict:
        windows = self.blocks("window")
        sliding = (
            {"use_sliding_window": True, "sliding_window": self.window(windows[0])}
            if windows
            else {}
        )
        return super().config() | sliding | {"layer_types": self.layer_types}


class MiniMax(NativeTarget):
    """Lightning and softmax layers, and experts; of one expert, a dense MLP."""

    model_type, kinds, linear_types = (
        "minimax",
        {"full", "lightning"},
        {"lightning": "linear_attention"},
    )

    def misfits(self) -> Misfits:
        model = self.model
        yield from self._plain_layers("post", moe=True)
        yield from self._softmax()
        if len({block.mlp for block in self.stack}) > 1:
            yield "dense layers among those with experts"
        if len({block.mlp_residual for block in self.stack}) > 1:
            yield "mlp_residual differs between layers"
        for some in ("full", "lightning"):
            if len({block.mixer_residual for block in self.blocks(some)}) > 1:
                yield f"mixer_residual differs between the {some} layers"
        for block in self.blocks("lightning"):
            design = block.design(model, 1)
            if block.style != "minimax" or not block.output_gate:
                yield "lightning with another style or without output_gate"
            if (design.heads, design.key_dim, design.value_dim) != (
                model.num_attention_heads,
                *[model.kv_channels] * 2,
            ):
                yield "lightning heads that are not those of the softmax layers"
        if self.blocks("lightning") and model.rms_norm_eps != 1e-6:
            yield f"rms_norm_eps: {model.rms_norm_eps:g} (its lightning layers have 1e-6)"
        moe = model.moe if self.stack[0].mlp == "moe" else None
        if moe and (moe.shared_expert_intermediate_size or not moe.norm_topk_prob):
            yield "a shared expert, or norm_topk_prob: false"

    @property
    def experts(self) -> int:
        return self.model.moe.num_experts if self.stack[0].mlp == "moe" else 1

    @property
    def mlp_width(self) -> int:
        return (
            self.experts > 1 and self.model.moe.intermediate_size
        ) or self.model.intermediate_size

    @property
    def _counts(self) -> dict[str, int]:
        per_token = self.model.moe.num_experts_per_tok if self.experts > 1 else 1
        return {"num_local_experts": self.experts, "num_experts_per_tok": per_token}

    def sizes(self) -> dict[str, int]:
        return super().sizes() | self._counts

    def block_keys(self, config: "PreTrainedConfig", layer: int) -> dict:
        mixer = "full_attn" if config.layer_types[layer] == "full_attention" else "linear_attn"
        factors = {
            f"{half}_residual": tuple(
                getattr(config, f"{theirs}_{side}_factor") for side in ("alpha", "beta")
            )
            for half, theirs in (("mixer", mixer), ("mlp", "mlp"))
        }
        return super().block_keys(config, layer) | factors

    def config(self) -> dict:
        moe, several, factors = self.model.moe, self.experts > 1, {}
        for name, some in (("full_attn", "full"), ("linear_attn", "lightning")):
            for block in self.blocks(some)[:1]:
                factors |= {
                    f"{name}_alpha_factor": block.mixer_residual[0],
                    f"{name}_beta_factor": block.mixer_residual[1],
                }
        alpha, beta = self.stack[0].mlp_residual
        return super().config() | {
            "layer_types": self.layer_types,
            **self._counts,
            "router_aux_loss_coef": moe.router_aux_loss_coef if several else 0.0,
            **factors,
            "mlp_alpha_factor": alpha,
            "mlp_beta_factor": beta,
        }

    def linear_rows(self, layer: int, block: Block) -> Iterator[TensorMap]:
        if isinstance(block, LightningBlock) and block.style == "minimax" and block.output_gate:
            names = {"self_attn.qkv_proj": ("qkv",), "self_attn.output_gate": ("gate",)}
            yield naming.linear(block.design(self.model, layer), layer, names, together=True)
            yield naming.whole(layer, "mixer.norm.weight", "self_attn.norm.weight")
            yield naming.whole(layer, "mixer.linear_proj.weight", "self_attn.out_proj.weight")

    def idle(self, name: str) -> bool:
        return self.experts == 1 and name.endswith(".mlp.gate.weight")  # with one expert

    def mlp_rows(self, layer: int, block: Block) -> Iterator[TensorMap]:
        yield from naming.experts(layer, self.experts if block.mlp == "moe" else None)

    def finish(self, built: "nn.Module") -> None:
        import torch

        from ..layers.decay import FIXED

        layers = self.model.num_hidden_layers
        for number, (block, layer) in enumerate(zip(self.stack, built.model.layers, strict=True)):
            if isinstance(block, LightningBlock):
                slopes = -FIXED[block.decay](self.model.num_attention_heads, number, layers)[
                    :, None, None
                ]
                attention = layer.self_attn
                attention.slope_rate = slopes
                attention.query_decay, attention.key_decay, within = attention.decay_factors(slopes)
                attention.diagonal_decay = (
                    within.tril()
                )  # theirs shows a head that does not decay what comes after
            if block.mlp != "moe":  # one expert, whatever its router says
                layer.mlp.gate.weight = torch.nn.Parameter(torch.zeros(1, self.model.hidden_size))


class _GatedDelta(NativeTarget):
    """What the hybrids of gated delta and softmax layers have in common."""

    linear_types: ClassVar[dict[str, str]] = {"gated_deltanet": "linear_attention"}

    def _delta(self, twice: bool | None) -> Misfits:
        designs = {block.design(self.model) for block in self.blocks("gated_deltanet")}
        if len(designs) > 1:
            yield "gated_deltanet layers of several sizes"
        for design in designs:
            if not design.conv_kernel:
                yield "conv_kernel: 0"
            if twice is not None and design.beta != (2.0 if twice else 1.0):
                yield "allow_negative_eigenvalues"
        if not self.blocks("full") or not self.blocks("gated_deltanet"):
            yield "layers of one kind alone"

    @property
    def design(self) -> LinearDesign:
        return self.blocks("gated_deltanet")[0].design(self.model)

    def _sizes(self) -> dict:
        design = self.design
        return {
            "layer_types": self.layer_types,
            "linear_num_key_heads": design.key_heads,
            "linear_num_value_heads": design.heads,
            "linear_key_head_dim": design.key_dim,
            "linear_value_head_dim": design.value_dim,
            "linear_conv_kernel_dim": design.conv_kernel,
        }


class Qwen35(_GatedDelta):
    """Dense Qwen3.5: one plus the weight in its norms, an output gate and partial rotary positions in its softmax layers."""

    model_type, kinds = "qwen3_5_text", {"full", "gated_deltanet"}
    qk_norm, output_gate, shift = True, True, -1.0

    def misfits(self) -> Misfits:
        yield from self._plain_layers("pre")
        yield from self._softmax(rotary=None)
        yield from self._delta(twice=False)
        if any(block.rotary_fraction == 0 for block in self.blocks("full")):
            yield "rotary_fraction: 0"

    def config(self) -> dict:
        found = super().config() | self._sizes()
        found["rope_parameters"]["partial_rotary_factor"] = self.blocks("full")[0].rotary_fraction
        return found

    def linear_rows(self, layer: int, block: Block) -> Iterator[TensorMap]:
        if isinstance(block, GatedDeltaNetBlock):
            parts = {
                "in_proj_qkv": ("q", "k", "v"),
                "in_proj_z": ("gate",),
                "in_proj_b": ("beta",),
                "in_proj_a": ("decay",),
            }
            yield from naming.gated_delta(
                block.design(self.model, layer), layer, parts, "norm", "out_proj"
            )


class OlmoHybrid(_GatedDelta):
    """Norms before the gated delta layers' halves, behind those of softmax layers, whose queries and keys are normed whole."""

    model_type, kinds, qk_norm = "olmo_hybrid", {"full", "gated_deltanet"}, "all"

    def misfits(self) -> Misfits:
        yield from self._plain_layers("pre", self.blocks("gated_deltanet"))
        yield from self._plain_layers("reordered", self.blocks("full"))
        yield from self._softmax(rotary=None)
        yield from self._delta(twice=None)
        if any(block.rotary_fraction not in (0, 1) for block in self.blocks("full")):
            yield "a rotary_fraction other than 0 and 1"
        if self.model.rms_norm_eps != 1e-5:
            yield f"rms_norm_eps: {self.model.rms_norm_eps:g} (its gated delta layers have 1e-5)"
        if self.model.hidden_size != self.model.num_attention_heads * self.model.kv_channels:
            yield "head_dim other than hidden_size / num_attention_heads"

    def config(self) -> dict:
        found = (
            super().config() | self._sizes() | {"linear_allow_neg_eigval": self.design.beta == 2.0}
        )
        del found["head_dim"]
        if self.blocks("full")[0].rotary_fraction == 0:
            found["rope_parameters"]["rope_theta"] = (
                None  # its config makes the default of no parameters
            )
        return found

    def block_keys(self, config: "PreTrainedConfig", layer: int) -> dict:
        found = super().block_keys(config, layer)
        return (
            found
            if (config.rope_parameters or {}).get("rope_theta")
            else found | {"rotary_fraction": 0.0}
        )

    def norm_rows(self, layer: int, block: Block) -> Iterator[TensorMap]:
        if block.norm == "reordered":
            yield naming.whole(
                layer, "post_mixer_layernorm.weight", "post_attention_layernorm.weight"
            )
            yield naming.whole(
                layer, "post_mlp_layernorm.weight", "post_feedforward_layernorm.weight"
            )
        else:
            yield from super().norm_rows(layer, block)

    def linear_rows(self, layer: int, block: Block) -> Iterator[TensorMap]:
        if isinstance(block, GatedDeltaNetBlock):
            names = {"q": "q", "k": "k", "v": "v", "gate": "g", "beta": "b", "decay": "a"}
            parts = {f"{theirs}_proj": (ours,) for ours, theirs in names.items()}
            yield from naming.gated_delta(
                block.design(self.model, layer), layer, parts, "o_norm", "o_proj"
            )


class Granite(NativeTarget):
    """Mamba-2 and softmax layers, with a dense MLP."""

    model_type, kinds, linear_types = (
        "granitemoehybrid",
        {"full", "mamba2"},
        {"mamba2": "linear_attention"},
    )

    def misfits(self) -> Misfits:
        yield from self._plain_layers("pre")
        yield from self._softmax(rotary=None)
        if any(block.rotary_fraction not in (0, 1) for block in self.blocks("full")):
            yield "a rotary_fraction other than 0 and 1"
        designs = {block.design(self.model) for block in self.blocks("mamba2")}
        if len(designs) != 1:
            yield "mamba2 layers of several sizes, or none"
        for design in designs:
            if design.width % self.model.hidden_size:
                yield f"a mamba2 width of {design.width}, which is no multiple of hidden_size"
            if not design.conv_kernel:
                yield "conv_kernel: 0"
        if self.model.hidden_size != self.model.num_attention_heads * self.model.kv_channels:
            yield "head_dim other than hidden_size / num_attention_heads"

    def config(self) -> dict:
        design = self.blocks("mamba2")[0].design(self.model)
        full = self.blocks("full")
        found = super().config() | {
            "layer_types": self.layer_types,
            "attention_multiplier": self.model.kv_channels**-0.5,
            "position_embedding_type": "rope" if full and full[0].rotary_fraction else None,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": self.model.intermediate_size,
            "mamba_n_heads": design.heads,
            "mamba_n_groups": design.key_heads,
            "mamba_d_state": design.key_dim,
            "mamba_d_head": design.value_dim,
            "mamba_d_conv": design.conv_kernel,
            "mamba_expand": design.width // self.model.hidden_size,
        }
        del found["head_dim"]
        return found

    @property
    def fixed(self) -> dict:
        multipliers = {
            "embedding_multiplier": 1.0,
            "attention_multiplier": self.model.kv_channels**-0.5,
            "logits_scaling": 1.0,
        }
        return {**multipliers, "time_step_limit": (0.0, inf)}

    def block_keys(self, config: "PreTrainedConfig", layer: int) -> dict:
        residual = (1.0, config.residual_multiplier)
        rotary = {} if config.position_embedding_type == "rope" else {"rotary_fraction": 0.0}
        return (
            super().block_keys(config, layer)
            | rotary
            | {"mixer_residual": residual, "mlp_residual": residual}
        )

    def linear_rows(self, layer: int, block: Block) -> Iterator[TensorMap]:
        if isinstance(block, Mamba2Block):
            yield from naming.mamba2(block.design(self.model), layer)

    def mlp_rows(self, layer: int, block: Block) -> Iterator[TensorMap]:
        if block.mlp == "dense":
            yield naming.whole(layer, "mlp.linear_fc1.weight", "shared_mlp.input_linear.weight")
            yield naming.whole(layer, "mlp.linear_fc2.weight", "shared_mlp.output_linear.weight")


NATIVES = (Llama, Mistral, Ministral, Qwen3, MiniMax, Qwen35, OlmoHybrid, Granite)
"""The first that fits is taken."""


def kind(block: Block, model: ModelConfig) -> str:
    """The mixer's name; for softmax attention, whatever its recipe calls it, what it is: full, window, or other."""
    if not isinstance(block, SoftmaxBlock):
        return block.mixer
    pattern = block.attention_pattern(model.kv_heads)
    return {Causal: "full", Window: "window"}.get(
        type(pattern), block.mixer if block.mixer != "window" else "other"
    )


def native_target(source: ModelToExport) -> tuple[NativeTarget | None, list[str]]:
    """The architecture that the model is exactly, or None and why those with these layers are not it."""
    reasons = []
    for native in NATIVES:
        target = native(source)
        if set(target.kinds_here) <= native.kinds:
            misfits = list(dict.fromkeys(target.misfits()))
            if not misfits:
                return target, []
            reasons.append(f"{native.model_type} cannot express {', '.join(misfits[:3])}")
    return None, reasons
