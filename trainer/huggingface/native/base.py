"""The base of the architectures of ``transformers``."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....attention.patterns import Causal, Window
from ...layers.base import Block
from ...layers.linear import LinearAttentionBlock
from ...layers.linear_design import LinearDesign
from ...layers.softmax import SoftmaxBlock
from ...recipe.schema import ModelConfig
from .. import naming
from ..target import Target
from ..tensor_map import TensorMap

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Mismatches = Iterator[str]
"""What an architecture cannot express, each as words for a message."""

_SIZE_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)


def layer_kind(block: Block, model: ModelConfig) -> str:
    """Return what an architecture calls the kind of a layer.

    For full and window attention this is the pattern, whatever the recipe calls it; for all others
    the word in the recipe.
    """
    pattern = block.attention_pattern(model.kv_heads)
    if isinstance(pattern, Causal):
        return "full"
    if isinstance(pattern, Window):
        return "window"
    return block.kind()


class NativeTarget(Target):
    """One architecture of transformers.

    It describes both ways. For export, :meth:`mismatches` decides whether the model is exactly
    this. For import, :meth:`required_sizes`, :meth:`fixed_values` and :meth:`trained_with` compare
    a folder's config with the recipe, which may have changed some of the layers.
    """

    kinds: ClassVar[Mapping[str, str]]
    """The kinds of layer that it may have, see :func:`layer_kind`, and what ``layer_types`` in its
    config calls them."""
    qk_norm: ClassVar[bool | Literal["all"]] = False
    """Whether softmax attention norms queries and keys, as :attr:`SoftmaxBlock.qk_norm`."""
    output_gate: ClassVar[bool] = False
    """Whether softmax attention has an output gate."""
    norm_offset: ClassVar[float] = 0.0
    """Its norms' weights are ours plus this."""

    # Which model it is

    def has_all_kinds(self) -> bool:
        """Return whether the architecture has all kinds of layer in the stack."""
        return {layer_kind(block, self.model) for block in self.stack} <= self.kinds.keys()

    @abstractmethod
    def mismatches(self) -> Mismatches:
        """Yield why the model is not exactly this, if its kinds of layer are."""

    # Where the tensors are

    def tensor_maps(self) -> Iterator[TensorMap]:
        """Yield the map of every parameter, layer by layer; if the model is not exactly this, of
        the parameters that both have.
        """
        yield from naming.embeddings(self.model, self.to_export.vocab_size, self.norm_offset)
        for layer, block in enumerate(self.stack):
            yield from self.norm_maps(layer, block)
            yield from self._mixer_maps(layer, block)
            yield from self.mlp_maps(layer, block)

    def norm_maps(self, layer: int, block: Block) -> Iterator[TensorMap]:
        """Yield the maps of the norms outside of the mixer."""
        if block.norm != "reordered":
            yield from naming.norms(layer, self.norm_offset)

    def _mixer_maps(self, layer: int, block: Block) -> Iterator[TensorMap]:
        if isinstance(block, SoftmaxBlock):
            yield from self.softmax_maps(layer, block)
        elif isinstance(block, LinearAttentionBlock) and block.kind() in self.kinds:
            yield from self.linear_maps(layer, block.design(self.model, layer))

    def softmax_maps(self, layer: int, block: SoftmaxBlock) -> Iterator[TensorMap]:
        """Yield the maps of a mixer with softmax attention, of whatever pattern."""
        yield from naming.softmax(self.model, layer, block.output_gate, self.output_gate)
        if self.qk_norm and block.qk_norm == self.qk_norm:
            yield from naming.qk_norms(layer, self.qk_norm is True, self.norm_offset)

    def linear_maps(self, layer: int, design: LinearDesign) -> Iterator[TensorMap]:
        """Yield the maps of a mixer with linear attention of one of this architecture's kinds."""
        raise NotImplementedError(f"{self.model_type} does not map its linear attention")

    def mlp_maps(self, layer: int, block: Block) -> Iterator[TensorMap]:
        """Yield the maps of the MLP or the experts."""
        if block.mlp == "dense":
            yield from naming.mlp(self.model, layer)

    def has_no_effect(self, hf_name: str) -> bool:
        """Return whether a Hugging Face tensor changes nothing, so that an import ignores it."""
        return False

    # Its config

    def config(self) -> dict[str, Any]:
        return self._base_config()

    def _base_config(self) -> dict[str, Any]:
        """Return what the configs of all architectures have."""
        return self.to_export.common_config() | {
            "num_hidden_layers": self.model.num_hidden_layers,
            "intermediate_size": self.intermediate_size,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.model.rope_theta},
        }

    def _maker(self, token_ids: dict[str, int | None]) -> "Callable[[], PreTrainedModel]":
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(self.model_type, **self.config(), **token_ids)
        return lambda: AutoModelForCausalLM.from_config(config)

    @property
    def intermediate_size(self) -> int:
        """The width of an MLP or an expert."""
        return self.model.intermediate_size

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer, as the config calls it."""
        return [self.kinds[layer_kind(block, self.model)] for block in self.stack]

    # What a folder's config must say, and what it may say otherwise

    def required_sizes(self) -> dict[str, int]:
        """Return the values that a folder's ``config.json`` must have for its tensors to have the
        shapes of ours.
        """
        config = self._base_config()
        return {key: config[key] for key in _SIZE_KEYS}

    def fixed_values(self) -> dict[str, Any]:
        """Return keys of the config for which a recipe can express no value but these."""
        return {}

    def trained_with(self, config: "PreTrainedConfig", layer: int) -> dict[str, Any]:
        """Return what ``config`` says about a layer, by the keys of its block in a recipe."""
        rope = config.rope_parameters or {}
        return {
            "rotary_fraction": rope.get("partial_rotary_factor", 1.0),
            "mixer_residual": (1.0, 1.0),
            "mlp_residual": (1.0, 1.0),
        }

    def buffer_problems(self, hf_model: "PreTrainedModel") -> Iterator[str]:
        """Yield where tensors of a loaded model that are no parameters differ from the recipe."""
        yield from ()

    # Help for the architectures

    def blocks(self, kind: str) -> list[Block]:
        """Return the blocks of all layers of a kind."""
        return [block for block in self.stack if layer_kind(block, self.model) == kind]

    @property
    def softmax_blocks(self) -> list[SoftmaxBlock]:
        """The blocks of all layers with softmax attention."""
        return [block for block in self.stack if isinstance(block, SoftmaxBlock)]

    def designs(self, kind: str) -> dict[int, LinearDesign]:
        """Return what the mixers of one kind of linear attention do, by the number of the layer."""
        return {
            layer: block.design(self.model, layer)
            for layer, block in enumerate(self.stack)
            if isinstance(block, LinearAttentionBlock) and block.kind() == kind
        }

    @property
    def windows(self) -> list[int]:
        """The tokens of the window of each layer that has one."""
        patterns = [block.attention_pattern(self.model.kv_heads) for block in self.stack]
        return [pattern.tokens for pattern in patterns if isinstance(pattern, Window)]

    def layer_mismatches(
        self, norm: str, blocks: Sequence[Block] | None = None, moe: bool = False
    ) -> Mismatches:
        """Yield what differs outside of the mixers.

        Args:
            norm: where the norms stand.
            blocks: the layers to look at; None for all.
            moe: whether they may have experts.
        """
        plain = (1.0, 1.0)
        for block in self.stack if blocks is None else blocks:
            if block.norm != norm:
                yield f"norm: {block.norm}"
            has_scales = (block.mixer_residual, block.mlp_residual) != (plain, plain)
            if norm != "post" and has_scales:
                yield "mixer_residual or mlp_residual"
            if block.mlp_activation != "silu":
                yield f"mlp_activation: {block.mlp_activation}"
            if block.mlp == "moe" and not moe:
                yield "mlp: moe"

    def softmax_mismatches(self, any_rotary_fraction: bool = False) -> Mismatches:
        """Yield what differs in the softmax attention.

        Args:
            any_rotary_fraction: whether another share of the dims than all may be rotated, the same
                in all layers.
        """
        blocks = self.softmax_blocks
        for block in blocks:
            if block.qk_norm != self.qk_norm:
                yield f"qk_norm: {str(block.qk_norm).lower()}"
            if block.output_gate != self.output_gate:
                yield f"output_gate: {str(block.output_gate).lower()}"
            if block.softcap or block.attention_sink:
                yield "softcap or attention_sink"
            rotary_fraction = blocks[0].rotary_fraction if any_rotary_fraction else 1.0
            if block.rotary_fraction != rotary_fraction:
                yield f"rotary_fraction: {block.rotary_fraction:g}"

    def partial_rotary_mismatches(self) -> Mismatches:
        """Yield what differs if all dims are rotated or none."""
        if any(block.rotary_fraction not in (0, 1) for block in self.softmax_blocks):
            yield "a rotary_fraction other than 0 or 1"

    def head_dim_mismatches(self) -> Mismatches:
        """Yield what differs if the config has no head_dim of its own."""
        if self.model.hidden_size != self.model.num_attention_heads * self.model.kv_channels:
            yield "head_dim other than hidden_size / num_attention_heads"

    def window_mismatches(self) -> Mismatches:
        """Yield what differs if all windows have one length."""
        if len(set(self.windows)) > 1:
            yield "windows of different lengths"
