"""Layers with softmax attention, each kind under a pattern of its own. Without torch."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ...attention.errors import InvalidField
from ...attention.patterns import (
    S2,
    Causal,
    ClosedFormPattern,
    MoBA,
    Pattern,
    PerHead,
    Rule,
    Selector,
    Streaming,
    Union,
    Window,
)
from ...attention.patterns.expression import parse_pattern
from .base import (
    Block,
    ContextSplit,
    Fraction,
    GPUCall,
    MixerContext,
    ModelSizes,
    Natural,
    Positive,
    Shapes,
    Visibility,
)
from .softmax_design import SoftmaxDesign

if TYPE_CHECKING:
    from ...attention.backend_choice import BackendChoice

_LONGEST = 1 << 40
"""Tokens that no document has: larger numbers of an exported pattern would not fit an int64."""


class SoftmaxBlock(Block):
    """Softmax attention with grouped queries, under a pattern."""

    qk_norm: bool | Literal["all"] = False
    """RMSNorm of queries and keys before rotation: of each head (Qwen3), or of all heads together
    (OLMo 2)."""
    output_gate: bool = False
    """Multiply the attention's output by a sigmoid of a projection of the layer's input
    (Qwen3-Next)."""
    rotary_fraction: Fraction = 1.0
    """Share of the head dimension that is rotated; 0 for no position embedding."""
    attention_sink: bool = False
    """A learned logit per query head, which takes its share of the softmax and adds nothing
    (gpt-oss)."""
    softcap: Annotated[float, Field(gt=0)] | None = None
    """Logits become softcap * tanh(logits / softcap) (Gemma 2)."""

    @property
    def has_kv_schedule(self) -> bool:
        return True

    @abstractmethod
    def attention_pattern(self, num_kv_heads: int) -> Pattern | Selector:
        """Return what the heads of the whole model see.

        Raises:
            ValueError: the block's keys make no pattern.
        """

    @property
    def norms_each_head(self) -> bool:
        return self.qk_norm is True

    def design(self, model: ModelSizes) -> SoftmaxDesign:
        """Return what the mixer does in such a model."""
        return SoftmaxDesign(
            pattern=self.attention_pattern(model.kv_heads),
            num_heads=model.num_attention_heads,
            num_kv_heads=model.kv_heads,
            head_dim=model.kv_channels,
            qk_norm=self.qk_norm,
            rotary_dim=int(model.kv_channels * self.rotary_fraction),
            output_gate=self.output_gate,
            attention_sink=self.attention_sink,
            softcap=self.softcap,
        )

    def build_mixer(self, context: MixerContext) -> Any:
        from .softmax_mixer import SoftmaxAttention

        shapes = self.parameter_shapes(context.sizes, context.layer)
        return SoftmaxAttention(context, shapes, self.design(context.sizes))

    def backend_choices(self, model: ModelSizes, call: GPUCall) -> "list[BackendChoice]":
        from ...attention.softmax.attend import fastest_backend
        from ...attention.softmax.tiles import LogitOptions

        design = self.design(model)
        heads = design.num_heads // call.tensor_ranks
        kv_heads = design.num_kv_heads // call.tensor_ranks
        q = call.activations(heads, design.head_dim)
        kv = call.activations(kv_heads, design.head_dim)
        logits = LogitOptions(design.head_dim**-0.5, design.softcap)
        return [fastest_backend(q, kv, kv, self._pattern_of_calls(design), logits)]

    def _pattern_of_calls(self, design: SoftmaxDesign) -> Pattern:
        """Return a pattern such as the backends are given."""
        assert isinstance(design.pattern, Pattern)
        return design.pattern

    def parameter_shapes(self, model: ModelSizes, layer: int) -> Shapes:
        width = model.num_attention_heads * model.kv_channels
        kv_width = model.kv_heads * model.kv_channels
        gates = width if self.output_gate else 0
        shapes: Shapes = {
            "linear_in.weight": (width + gates + 2 * kv_width, model.hidden_size),
            "linear_proj.weight": (model.hidden_size, width),
        }
        if self.qk_norm == "all":
            shapes |= {"q_norm.weight": (width,), "k_norm.weight": (kv_width,)}
        elif self.qk_norm:
            head = (model.kv_channels,)
            shapes |= {"q_layernorm.weight": head, "k_layernorm.weight": head}
        if self.attention_sink:
            shapes["sinks"] = (model.num_attention_heads,)
        return shapes

    def mixing_flops(self, model: ModelSizes, length: int, layer: int) -> float:
        width = model.num_attention_heads * model.kv_channels
        return 4 * width * self._visible_pairs(model, length) / (model.kv_heads * length)

    @abstractmethod
    def _visible_pairs(self, model: ModelSizes, length: int) -> int:
        """Count the pairs of a query and a key that all KV heads see."""

    def state_numbers(self, model: ModelSizes, length: int, layer: int) -> int:
        return self._kept_keys(model, length) * 2 * model.kv_channels

    @abstractmethod
    def _kept_keys(self, model: ModelSizes, length: int) -> int:
        """Count the keys of all KV heads, out of ``length``, that the next tokens may see."""

    def exchanged_bytes(self, model: ModelSizes, layer: int, split: ContextSplit) -> float:
        return 0.0  # only keys and values, by a KV schedule

    def problems(self, model: ModelSizes) -> Iterator[InvalidField]:
        yield from self._pattern_problems(model.kv_heads)
        rotary_dims = model.kv_channels * self.rotary_fraction
        if rotary_dims % 2:
            reason = (
                f"rotates {rotary_dims:g} of {model.kv_channels} dims; it must be an even number"
            )
            yield InvalidField("rotary_fraction", reason)
        if self.norms_each_head and model.kv_channels == 1:
            reason = "of heads of one dim leaves only its sign; use a larger head_dim, or no norm"
            yield InvalidField("qk_norm", reason)

    def _pattern_problems(self, num_kv_heads: int) -> Iterator[InvalidField]:
        try:
            self.attention_pattern(num_kv_heads)
        except InvalidField as error:  # keys of the block are named like those of the pattern
            yield error


class ClosedFormBlock(SoftmaxBlock):
    """Softmax attention under a pattern that is known before the text is."""

    @abstractmethod
    def attention_pattern(self, num_kv_heads: int) -> ClosedFormPattern: ...

    def rules(self, num_kv_heads: int) -> list[Rule]:
        pattern = self.attention_pattern(num_kv_heads)
        return [rule for head in range(num_kv_heads) for rule in pattern.rules(head)]

    def _visible_pairs(self, model: ModelSizes, length: int) -> int:
        pattern = self.attention_pattern(model.kv_heads)
        return sum(pattern.visible_pairs(length, head) for head in range(model.kv_heads))

    def _kept_keys(self, model: ModelSizes, length: int) -> int:
        """Count the keys that the last query sees, or a later one within a pattern's period."""
        pattern = self.attention_pattern(model.kv_heads)
        count = 0
        for head in range(model.kv_heads):
            rules = [rule.within(length) for rule in pattern.rules(head)]
            periods = [rule.block * rule.step for rule in rules if rule.relative]
            query_stop = length + max(periods, default=0)
            for blocks in pattern.need(length - 1, query_stop, head):
                count += int((blocks.positions() < length).sum())
        return count

    def leaves_gaps(self, num_kv_heads: int) -> bool:
        """Return whether it has stripes at every distance, and yet leaves gaps between them.

        Some positions are then only seen from nearby. A window on its own leaves no gaps: it is
        meant to end.
        """
        rules = self.rules(num_kv_heads)
        has_stripes = any(rule.reach is None and rule.step > 1 for rule in rules)
        return has_stripes and not self.attention_pattern(num_kv_heads).covers(num_kv_heads)

    def visibility(self, model: ModelSizes, positions: np.ndarray, source: int) -> Visibility:
        pattern = self.attention_pattern(model.kv_heads)
        mask = pattern.mask(positions.clip(min=0), [source], model.kv_heads)  # [heads, queries, 1]
        visible = mask.any(0)[:, 0].numpy() | (positions == source)
        return Visibility(visible, visible)

    def telling_length(self, num_kv_heads: int) -> int:
        rules = self.rules(num_kv_heads)
        return max(2 * rule.block * max(rule.step, rule.reach or 1) for rule in rules)

    def exported(self, model: ModelSizes, layer: int) -> dict[str, Any]:
        pattern = self.attention_pattern(model.kv_heads)
        rules = [
            [list(asdict(rule.within(_LONGEST)).values()) for rule in pattern.rules(head)]
            for head in range(model.kv_heads)
        ]
        design = self.design(model)
        return {
            "kind": "softmax",
            "rules": rules,
            "rotary_dim": design.rotary_dim,
            "output_gate": design.output_gate,
            "softcap": design.softcap,
            "qk_norm": design.qk_norm,
            "attention_sink": design.attention_sink,
        }


class FullBlock(ClosedFormBlock):
    """Causal attention over the whole document."""

    mixer: Literal["full"]

    def attention_pattern(self, num_kv_heads: int) -> ClosedFormPattern:
        return Causal()


class S2Block(ClosedFormBlock):
    """S2-Attention: a local band and stripes that differ per KV head (arXiv 2407.17678)."""

    mixer: Literal["s2"]
    block: Positive = 64
    """Tokens in a block of the pattern: a power of two."""
    local_blocks: Positive = 16
    """Blocks in the local band, including the query's own."""
    stride: Positive = 16
    """Every stride-th block is visible at any distance."""
    dense_heads: Natural = 0
    """This number of KV heads, from the first on, see everything."""
    offset: Natural = 0
    """Blocks by which the stripes are shifted."""
    near: Annotated[tuple[Positive, Positive], Field(strict=False)] | None = None
    """[blocks, stride]: a finer stride within that many blocks."""

    def attention_pattern(self, num_kv_heads: int) -> ClosedFormPattern:
        pattern = S2(
            self.block,
            self.local_blocks,
            self.stride,
            self.dense_heads,
            self.offset,
            near=self.near,
        )
        return pattern.spread(num_kv_heads)

    def _pattern_problems(self, num_kv_heads: int) -> Iterator[InvalidField]:
        problems = list(super()._pattern_problems(num_kv_heads))
        if not problems and self.dense_heads > num_kv_heads:
            reason = f"{self.dense_heads} is more than the {num_kv_heads} KV heads"
            problems.append(InvalidField("dense_heads", reason))
        yield from problems


class WindowBlock(ClosedFormBlock):
    """Only the last tokens."""

    mixer: Literal["window"]
    window: Positive
    """Number of tokens, including the query's own."""

    def attention_pattern(self, num_kv_heads: int) -> ClosedFormPattern:
        return Window(self.window)


class StreamingBlock(ClosedFormBlock):
    """The first and the last tokens of what came before (StreamingLLM, arXiv 2309.17453)."""

    mixer: Literal["streaming"]
    sinks: Positive = 4
    """Number of tokens at the start of the document."""
    window: Positive
    """Number of last tokens, including the query's own."""

    def attention_pattern(self, num_kv_heads: int) -> ClosedFormPattern:
        return Streaming(self.sinks, self.window)


class PatternBlock(ClosedFormBlock):
    """Any pattern, written as an expression."""

    mixer: Literal["pattern"]
    pattern: str
    """Like "S2(64, 16, 16) | Sinks(4)", or "PerHead([Window(512), Causal()])" with one for each KV
    head; stripes are spread evenly over the heads."""

    def attention_pattern(self, num_kv_heads: int) -> ClosedFormPattern:
        return parse_pattern(self.pattern).spread(num_kv_heads)

    def _pattern_problems(self, num_kv_heads: int) -> Iterator[InvalidField]:
        try:
            pattern = self.attention_pattern(num_kv_heads)
        except ValueError as error:
            yield InvalidField("pattern", str(error))
            return
        for per_head in _per_heads(pattern):
            if (per_head.first_head, len(per_head.patterns)) != (0, num_kv_heads):
                reason = (
                    f"PerHead lists {len(per_head.patterns)} patterns, but the model has "
                    f"{num_kv_heads} KV heads; list one for each, from head 0"
                )
                yield InvalidField("pattern", reason)


def _per_heads(pattern: Pattern) -> Iterator[PerHead]:
    """Yield every :class:`PerHead` in an expression, however deep."""
    if isinstance(pattern, Union):
        for part in pattern.parts:
            yield from _per_heads(part)
    elif isinstance(pattern, PerHead):
        yield pattern
        for part in pattern.patterns:
            yield from _per_heads(part)


class MoBABlock(SoftmaxBlock):
    """Blocks of keys chosen from the content (MoBA, arXiv 2502.13189)."""

    mixer: Literal["moba"]
    block: Positive = 64
    """Tokens in a block: a power of two."""
    top_k: Positive = 8
    """Number of blocks that a query sees, including its own."""
    select: Literal["group", "head"] = "group"
    """Who chooses: every query head ("head", as published), or the query heads of each KV head
    together, by their mean ("group")."""

    def attention_pattern(self, num_kv_heads: int) -> MoBA:
        return MoBA(self.block, self.top_k, self.select)

    def _pattern_of_calls(self, design: SoftmaxDesign) -> Pattern:
        import torch

        from ...attention.patterns.token_lists import TokenLists

        no_lists = torch.empty(1, design.num_kv_heads, 0, self.top_k, dtype=torch.int32)
        return TokenLists(self.block, no_lists, choosers_per_kv_head=1, listed=())

    def _visible_pairs(self, model: ModelSizes, length: int) -> int:
        positions = np.arange(length)
        chosen = np.minimum(positions // self.block, self.top_k - 1) * self.block
        own = positions % self.block + 1
        return model.kv_heads * int((chosen + own).sum())

    def _kept_keys(self, model: ModelSizes, length: int) -> int:
        return model.kv_heads * length  # any of them may be chosen later

    @property
    def rank_block(self) -> int:
        return self.block

    def telling_length(self, num_kv_heads: int) -> int:
        return 4 * self.block * self.top_k  # most queries have to leave blocks out

    def saved_run_problem(self) -> str | None:
        if "select" in self.model_fields_set:
            return None
        return (
            "was trained when all queries of a block chose their keys together, so that tokens saw "
            "what comes after them; start a new run"
        )

    def export_problem(self) -> str | None:
        return "chooses its keys from the content, which no exported code does"

    def exported(self, model: ModelSizes, layer: int) -> dict[str, Any]:
        raise ValueError(f"{self.kind()} {self.export_problem()}")
