"""Layers with linear attention: published mixers as presets of one design. Without torch."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from ...attention.errors import InvalidField
from .base import (
    Block,
    ContextSplit,
    GPUCall,
    HeadCount,
    MixerContext,
    ModelSizes,
    Natural,
    Positive,
    Shapes,
    Visibility,
)
from .linear_design import LinearDesign

if TYPE_CHECKING:
    from ...attention.backend_choice import BackendChoice


class LinearAttentionBlock(Block):
    """Keys that all kinds of linear attention share."""

    num_heads: HeadCount | None = None
    """Number of heads; defaults to num_attention_heads. Unless head dims are given, more heads have
    fewer dims each: the width, num_attention_heads * head_dim, stays."""
    key_head_dim: Positive | None = None
    """Dims of a query and a key."""
    value_head_dim: Positive | None = None
    """Dims of a value; the mixer's output has num_heads times as many."""

    decay_rank_key: ClassVar[str] = "value_head_dim"
    """Which key the rank of the decays comes from, if they have one."""

    def design(self, model: ModelSizes, layer: int = 0) -> LinearDesign:
        """Return what the mixer of layer ``layer`` (from 0) does.

        Raises:
            InvalidField: the sizes do not fit.
        """
        heads = self.num_heads or model.num_attention_heads
        width = model.num_attention_heads * model.kv_channels
        design = self._preset(LinearDesign(heads, heads, *self._head_dims(width, heads)))
        if heads % design.key_heads:
            reason = f"{design.key_heads} does not divide the {heads} heads"
            raise InvalidField("num_key_heads", reason)
        if design.rotary and design.key_dim % 2:
            dims = design.key_dim
            reason = f"{dims} is odd, but is rotated in pairs; use {dims + 1}"
            raise InvalidField("key_head_dim", reason)
        _check_normed_dims(design)
        return design

    def _head_dims(self, width: int, heads: int) -> tuple[int, int]:
        """Return the dims of a key and of a value: those given, else the preset's shares of a
        head's part of the width.
        """
        key_share, value_share = self._shares
        key_dim = self.key_head_dim or _default_dim("key_head_dim", key_share, width, heads)
        value_dim = self.value_head_dim or _default_dim("value_head_dim", value_share, width, heads)
        return key_dim, value_dim

    @property
    def _shares(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Default key dims and value dims, as fractions of a head's part of the width."""
        return (1, 1), (1, 1)

    @abstractmethod
    def _preset(self, plain: LinearDesign) -> LinearDesign:
        """Return ``plain`` with the steps of the paper."""

    def build_mixer(self, context: MixerContext) -> Any:
        from .linear_mixer import LinearAttention

        design = self.design(context.sizes, context.layer)
        return LinearAttention(context, design)

    def backend_choices(self, model: ModelSizes, call: GPUCall) -> "list[BackendChoice]":
        import torch

        from ...attention.linear.attention import fastest_backend

        design = self.design(model)
        heads = design.heads // call.tensor_ranks
        key_heads = design.key_heads // call.tensor_ranks
        value_dim = design.value_dim + design.normalised
        q = call.activations(key_heads, design.feature_dim)
        beta = call.activations(heads) if design.beta else None
        decay = None
        if design.decay != "none":
            per_token = (call.batch, call.tokens) if design.computes_decay else ()
            per_key = (design.feature_dim,) if design.decay_rank else ()
            decay = call.empty(*per_token, heads, *per_key, dtype=torch.float32)

        value_dims = [value_dim]
        if beta is not None and call.context_ranks > 1:  # the map of a segment's states
            value_dims.append(value_dim + design.feature_dim)
        return [
            fastest_backend(q, q, call.activations(heads, dim), decay, beta) for dim in value_dims
        ]

    def parameter_shapes(self, model: ModelSizes, layer: int) -> Shapes:
        return self.design(model, layer).parameter_shapes(model.hidden_size)

    def mixing_flops(self, model: ModelSizes, length: int, layer: int) -> float:
        design = self.design(model, layer)
        # The state is written and read; with the delta rule first recalled. Decays multiply it.
        passes = 3 if design.beta else 2
        return design.state_numbers * (2 * passes + (design.decay != "none"))

    def state_numbers(self, model: ModelSizes, length: int, layer: int) -> int:
        design = self.design(model, layer)
        return design.state_numbers + max(0, design.conv_kernel - 1) * design.conv_channels

    def exchanged_bytes(self, model: ModelSizes, layer: int, split: ContextSplit) -> float:
        design = self.design(model, layer)
        # A segment maps a state to the next one: a matrix with the delta rule, else a factor.
        kept = design.feature_dim if design.beta else 1
        columns = design.value_dim + design.normalised + kept
        map_numbers = design.heads * design.feature_dim * columns / split.tensor_ranks
        halo = max(0, design.conv_kernel - 1) * design.conv_channels / split.tensor_ranks
        map_bytes = 4 * split.state_steps * map_numbers
        return 2 * split.segments * (map_bytes + 2 * (split.ranks - 1) * halo)

    def problems(self, model: ModelSizes) -> Iterator[InvalidField]:
        if not model.kv_channels:  # a head without dims is a problem of the model
            return
        try:
            self.design(model)
        except InvalidField as error:
            yield error

    def tensor_parallel_splits(self, model: ModelSizes) -> dict[str, int]:
        try:
            design = self.design(model)
        except InvalidField:  # which `problems` reports
            return {}
        heads_key = "num_key_heads" if design.key_heads != design.heads else "num_heads"
        splits = {heads_key: design.key_heads}
        if design.decay_rank:
            splits[self.decay_rank_key] = design.decay_rank
        return splits

    def visibility(self, model: ModelSizes, positions: np.ndarray, source: int) -> Visibility:
        may = positions >= source
        return Visibility(may, may & (positions <= source + 1))  # what a state holds fades

    def exported(self, model: ModelSizes, layer: int) -> dict[str, Any]:
        from .decay import FIXED

        design = self.design(model, layer)
        log_decay = None
        if design.decay in FIXED:
            log = FIXED[design.decay](design.heads, layer, model.num_hidden_layers)
            log_decay = log.tolist()
        return {"kind": "linear", **asdict(design), "log_decay": log_decay}


def _check_normed_dims(design: LinearDesign) -> None:
    """Raise InvalidField if a norm is over a single number: it would leave only its sign."""
    normed_values = {
        "none": 0,
        "head": design.value_dim,
        "key_head": design.group * design.value_dim,
        "all": design.width,
    }
    if normed_values[design.norm] == 1:
        reason = "1 leaves only the sign of each value after the mixer's norm; use 2 or more"
        raise InvalidField("value_head_dim", reason)
    if design.feature_map == "l2" and design.key_dim == 1:
        reason = "1 leaves only the sign of keys, which have unit length; use 2 or more"
        raise InvalidField("key_head_dim", reason)


def _default_dim(key: str, share: tuple[int, int], width: int, heads: int) -> int:
    """Return ``share`` of a head's part of the width, which must be a whole number."""
    dim = width * share[0] / (heads * share[1])
    if dim >= 1 and dim == int(dim):
        return int(dim)
    if share == (1, 1):
        reason = f"{heads} does not divide the width, {width}; set {key}"
        raise InvalidField("num_heads", reason)
    part = f"{share[0]}/{share[1]} of a head's part of the width {width}"
    raise InvalidField(key, f"defaults to {part}, {dim:g} with {heads} heads; set it")


class LinearBlock(LinearAttentionBlock):
    """Linear attention with ``elu + 1``, its weights normalized (arXiv 2006.16236 eq. 7-9)."""

    mixer: Literal["linear"]

    def _preset(self, plain: LinearDesign) -> LinearDesign:
        return replace(plain, feature_map="elu", normalised=True)


class LightningBlock(LinearAttentionBlock):
    """Lightning attention: a fixed decay per head.

    ``minimax`` (arXiv 2501.08313 sec. 2.2; `minimax` in transformers): SiLU of queries, keys and
    values, RMSNorm over all heads together, a sigmoid gate. ``transnormer`` (arXiv 2307.14995):
    SiLU of queries and keys, a norm without weight, a gate without activation, and in the first
    layer LRPE, a rotation with learned angles; TransNormerLLM also has ``mlp_activation:
    identity``. MiniMax's code fixes the eps of its inner norm at 1e-6, here it is the model's; the
    norms of TransNormerLLM's layers have no weight, ours do.
    """

    mixer: Literal["lightning"]
    style: Literal["minimax", "transnormer"] = "minimax"
    """Whose activations, norm and gate it has."""
    decay: Literal["minimax", "paper"] = "minimax"
    """minimax: ALiBi's slopes, weaker from layer to layer, as in the published models. paper: arXiv
    2307.14995 eq. 10."""
    output_gate: bool = True
    """Multiply the normalized output by a gate, a projection of the layer's input."""

    def design(self, model: ModelSizes, layer: int = 0) -> LinearDesign:
        design = super().design(model, layer)
        if self.style == "transnormer" and layer == 0:
            return replace(design, feature_map="lrpe")
        return design

    def _preset(self, plain: LinearDesign) -> LinearDesign:
        plain = replace(plain, decay=self.decay, norm="all")
        if self.style == "minimax":
            return replace(plain, silu="qkv", gate="sigmoid" if self.output_gate else "none")
        return replace(
            plain,
            silu="qk",
            norm_weight=False,
            gate="identity" if self.output_gate else "none",
        )


class RetentionBlock(LinearAttentionBlock):
    """RetNet's retention (arXiv 2307.08621 eq. 5-9): rotated queries and keys, a fixed decay, a
    norm per head, a SiLU gate.

    Rotary positions replace xPos, whose magnitudes are the decay; RMSNorm replaces GroupNorm, as in
    the authors' code. That code also divides weights by their sums, which the norm undoes, and
    spaces its angles like ``linspace``.
    """

    mixer: Literal["retention"]

    @property
    def _shares(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (1, 1), (2, 1)

    def _preset(self, plain: LinearDesign) -> LinearDesign:
        scale = plain.key_dim**-0.5
        return replace(
            plain,
            rotary=True,
            decay="retention",
            scale=scale,
            norm="head",
            norm_weight=False,
            gate="silu",
        )


class SimpleGLABlock(LinearAttentionBlock):
    """Gated linear attention with one decay per head and token (arXiv 2312.06635 sec. 4.4).

    By default, fla's `simple_gla` also has a short convolution and a bias in its gate, unlike the
    paper.
    """

    mixer: Literal["simple_gla"]

    def _preset(self, plain: LinearDesign) -> LinearDesign:
        return replace(plain, decay="sigmoid", scale=plain.key_dim**-0.5, norm="head", gate="silu")


class GLABlock(LinearAttentionBlock):
    """Gated linear attention: every key has a decay of its own, from a projection of low rank
    (arXiv 2312.06635 sec. 4).

    RMSNorm replaces the paper's LayerNorm, as in the authors' code.
    """

    mixer: Literal["gla"]
    decay_rank: Positive = 16
    """Rank of the projection that the decays come from."""
    decay_rank_key: ClassVar[str] = "decay_rank"

    @property
    def _shares(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (1, 2), (1, 1)

    def _preset(self, plain: LinearDesign) -> LinearDesign:
        scale = plain.key_dim**-0.5
        return replace(
            plain,
            decay="sigmoid",
            decay_rank=self.decay_rank,
            scale=scale,
            norm="head",
            gate="silu",
        )


class BasedBlock(LinearAttentionBlock):
    """Based: the exponential's Taylor polynomial, with queries and keys of few dims, normalized
    (arXiv 2402.18668 sec. 4.1).
    """

    mixer: Literal["based"]
    key_head_dim: Positive | None = 16
    """Dims d of a query and a key; the state has 1 + d + d (d + 1) / 2 rows."""

    def _preset(self, plain: LinearDesign) -> LinearDesign:
        return replace(plain, feature_map="taylor", normalised=True)


class HedgehogBlock(LinearAttentionBlock):
    """Hedgehog: learned feature maps that imitate a softmax, normalized (arXiv 2402.04347)."""

    mixer: Literal["hedgehog"]

    def _preset(self, plain: LinearDesign) -> LinearDesign:
        return replace(plain, feature_map="hedgehog", normalised=True)


class _ConvolvedBlock(LinearAttentionBlock):
    conv_kernel: Natural = 4
    """Tokens that the short convolution of queries, keys and values sees; 0 for none, but SiLU."""


class Mamba2Block(_ConvolvedBlock):
    """Mamba-2 (arXiv 2405.21060 eq. 1, sec. 5-7): heads share queries and keys (C and B), and
    values are multiplied by their step.

    Each head adds a multiple of its values. The norm is that of the gated output, over the heads of
    one key head together.
    """

    mixer: Literal["mamba2"]
    key_head_dim: Positive | None = 128
    """Size of the state."""
    num_key_heads: HeadCount = 1
    """Number of groups of heads that share queries and keys; tensor parallelism splits no group."""

    @property
    def _shares(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (1, 1), (2, 1)

    def _preset(self, plain: LinearDesign) -> LinearDesign:
        return replace(
            plain,
            key_heads=self.num_key_heads,
            conv_kernel=self.conv_kernel,
            conv_bias=True,
            silu="qkv",
            decay="softplus",
            steps=True,
            skip=True,
            norm="key_head",
            gate="silu",
            gate_first=True,
        )


class _DeltaBlock(_ConvolvedBlock):
    mixer: Literal["deltanet", "gated_deltanet", "kda"]
    allow_negative_eigenvalues: bool = False
    """Replace up to twice what was recalled (arXiv 2411.12537)."""

    def _preset(self, plain: LinearDesign) -> LinearDesign:
        return replace(
            plain,
            conv_kernel=self.conv_kernel,
            silu="qkv",
            feature_map="l2",
            beta=2.0 if self.allow_negative_eigenvalues else 1.0,
            scale=plain.key_dim**-0.5,
            norm="head",
        )


class DeltaNetBlock(_DeltaBlock):
    """DeltaNet (arXiv 2406.06484 sec. 2.2, 3.3): a new value replaces what its key recalls. Keys
    and queries have unit length.
    """

    mixer: Literal["deltanet"]


class GatedDeltaNetBlock(_DeltaBlock):
    """Gated DeltaNet (arXiv 2412.06464 eq. 10): the delta rule after a decay per head;
    `qwen3_next`, `olmo_hybrid`.
    """

    mixer: Literal["gated_deltanet"]
    num_key_heads: HeadCount | None = None
    """Number of key heads; defaults to num_heads. Several heads may share one (Qwen3-Next)."""

    @property
    def _shares(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (3, 4), (3, 2)

    def _preset(self, plain: LinearDesign) -> LinearDesign:
        plain = replace(plain, key_heads=self.num_key_heads or plain.heads)
        return replace(super()._preset(plain), decay="softplus", gate="silu")


class KDABlock(_DeltaBlock):
    """Kimi Delta Attention (arXiv 2510.26692 eq. 1): the delta rule after a decay of each key;
    `kimi_linear`.

    Decays and the sigmoid gate come from projections whose rank is the dims of a head. fla's gate
    also has a bias.
    """

    mixer: Literal["kda"]

    def _preset(self, plain: LinearDesign) -> LinearDesign:
        rank = plain.value_dim
        return replace(
            super()._preset(plain),
            decay="softplus",
            decay_rank=rank,
            gate="sigmoid",
            gate_rank=rank,
        )
