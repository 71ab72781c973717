"""The kinds of layer that a recipe may name: what they have in common, and those with softmax attention. Without torch."""

from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ....attention.patterns import S2, Causal, Pattern, Streaming, Window
from ....attention.patterns.expression import parse_pattern
from ....attention.patterns.selection import MoBA, Selector

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Scales = Annotated[tuple[float, float], Field(strict=False)]  # YAML has lists, no tuples


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Block(Section):
    """What every kind of layer has: where its norms stand, and how its two halves join the residual stream."""

    norm: Literal["pre", "post", "sandwich", "reordered"] = "pre"
    """pre: x + f(norm(x)). post: n + f(n) with n = norm(x) (MiniMax, DeepNorm). sandwich: x + norm(f(norm(x)))
    (Gemma). reordered: x + norm(f(x)) (OLMo 2)."""
    mixer_residual: Scales = (1.0, 1.0)
    """Scales of the residual stream and of the mixer's output where they are added."""
    mlp_residual: Scales = (1.0, 1.0)
    """Scales of the residual stream and of the MLP's output where they are added."""
    mlp: Literal["dense", "moe"] = "dense"
    """moe: the experts of model.moe in place of one MLP."""
    mlp_activation: Literal["silu", "identity"] = "silu"
    """Of the MLP's gate: silu is SwiGLU, identity is TransNormerLLM's SGLU (arXiv 2307.14995)."""


class SoftmaxBlock(Block):
    """Attention with grouped queries, under some pattern."""

    qk_norm: bool | Literal["all"] = False
    """RMSNorm of queries and keys before rotation: of each head (Qwen3), or of all heads together (OLMo 2)."""
    output_gate: bool = False
    """Multiply the attention's output by a sigmoid of a projection of the layer's input (Qwen3-Next)."""
    rotary_fraction: Fraction = 1.0
    """Share of the head dimension that is rotated; 0 for no position embedding."""
    attention_sink: bool = False
    """A learned logit per query head that takes its share of the softmax and adds nothing (gpt-oss)."""
    softcap: Annotated[float, Field(gt=0)] | None = None
    """Logits become softcap * tanh(logits / softcap) (Gemma 2)."""

    @abstractmethod
    def attention_pattern(self, num_kv_heads: int) -> Pattern | Selector:
        """What the heads of the whole model see; ValueError where the block's keys make no pattern."""

    def leaves_gaps(self, num_kv_heads: int) -> bool:
        """Whether it has stripes at every distance, and yet there are positions that only nearby queries see.

        A window on its own leaves none: it is meant to end.
        """
        pattern = self.attention_pattern(num_kv_heads)
        if isinstance(pattern, Selector):
            return False
        striped = any(
            rule.reach is None and rule.step > 1
            for head in range(num_kv_heads)
            for rule in pattern.rules(head)
        )
        return striped and not pattern.covers(num_kv_heads)


class FullBlock(SoftmaxBlock):
    """Causal attention over the whole document."""

    mixer: Literal["full"]

    def attention_pattern(self, num_kv_heads: int) -> Pattern:
        return Causal()


class S2Block(SoftmaxBlock):
    """S2-Attention: a local band and stripes that differ per KV head (arXiv 2407.17678)."""

    mixer: Literal["s2"]
    block: Positive = 64
    """Tokens in a block of the pattern: a power of two."""
    local_blocks: Positive = 16
    """Blocks in the local band, the query's own among them."""
    stride: Positive = 16
    """Every stride-th block is seen at any distance."""
    dense_heads: Natural = 0
    """The first so many KV heads see everything."""
    offset: Natural = 0
    """Blocks by which the stripes are moved."""
    near: Annotated[tuple[Positive, Positive], Field(strict=False)] | None = None
    """[blocks, stride]: a finer stride within so many blocks."""

    def attention_pattern(self, num_kv_heads: int) -> Pattern:
        pattern = S2(
            self.block,
            self.local_blocks,
            self.stride,
            self.dense_heads,
            self.offset,
            near=self.near,
        )
        return pattern.spread(num_kv_heads)


class WindowBlock(SoftmaxBlock):
    """The last tokens alone."""

    mixer: Literal["window"]
    window: Positive
    """How many tokens, the query's own among them."""

    def attention_pattern(self, num_kv_heads: int) -> Pattern:
        return Window(self.window)


class StreamingBlock(SoftmaxBlock):
    """The first and the last tokens of what came before (StreamingLLM, arXiv 2309.17453)."""

    mixer: Literal["streaming"]
    sinks: Positive = 4
    """The first so many tokens of the document."""
    window: Positive
    """The last so many, the query's own among them."""

    def attention_pattern(self, num_kv_heads: int) -> Pattern:
        return Streaming(self.sinks, self.window)


class PatternBlock(SoftmaxBlock):
    """Any pattern, as an expression."""

    mixer: Literal["pattern"]
    pattern: str
    """As in "S2(64, 16, 16) | Sinks(4)", or "PerHead([Window(512), Causal()])" with one for each KV head; stripes are
    spread evenly over the heads."""

    def attention_pattern(self, num_kv_heads: int) -> Pattern:
        return parse_pattern(self.pattern).spread(num_kv_heads)


class MoBABlock(SoftmaxBlock):
    """Blocks of keys chosen from the content (MoBA, arXiv 2502.13189)."""

    mixer: Literal["moba"]
    block: Positive = 64
    """Tokens in a block: a power of two."""
    top_k: Positive = 8
    """Blocks that a block of queries sees, its own among them."""

    def attention_pattern(self, num_kv_heads: int) -> MoBA:
        return MoBA(self.block, self.top_k)
