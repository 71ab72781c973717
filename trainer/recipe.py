"""What a recipe may say. Nothing here imports torch: a recipe is checked before any process starts."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..attention.expression import parse_pattern
from ..attention.patterns import S2, Causal, Pattern, PerHead, Streaming, Union, Window
from ..attention.selection import MoBA, Selector

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Scales = Annotated[tuple[float, float], Field(strict=False)]  # YAML has lists, no tuples


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Block(Section):
    """What every kind of layer has: where its norms stand, and how its two halves join the residual stream."""

    norm: Literal["pre", "post", "sandwich", "reordered"] = "pre"
    """pre: x + f(norm(x)). post: n + f(n) with n = norm(x) (MiniMax, DeepNorm). sandwich: x + norm(f(norm(x)))
    (Gemma). reordered: x + norm(f(x)) (OLMo 2)."""
    mixer_residual: Scales = (1.0, 1.0)
    """Scales of the residual stream and of the mixer's output where they are added."""
    mlp_residual: Scales = (1.0, 1.0)
    """Scales of the residual stream and of the MLP's output where they are added."""


class SoftmaxBlock(Block):
    """Attention with grouped queries, under some pattern."""

    qk_norm: bool = False
    """RMSNorm of each query and key head before rotation (Qwen3)."""
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
        striped = any(rule.reach is None and rule.step > 1 for head in range(num_kv_heads) for rule in pattern.rules(head))
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
        pattern = S2(self.block, self.local_blocks, self.stride, self.dense_heads, self.offset, near=self.near)
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


class LightningBlock(Block):
    """Linear attention with a fixed decay per head, as in MiniMax-01 (arXiv 2501.08313)."""

    mixer: Literal["lightning"]
    num_heads: Positive | None = None
    """Defaults to num_attention_heads. The width stays num_attention_heads * head_dim: more heads have fewer dims each,
    and more decays between the shortest and the longest memory."""
    output_gate: bool = True
    """Multiply the normalised output by a sigmoid of a projection of the layer's input."""


class MoBABlock(SoftmaxBlock):
    """Blocks of keys chosen from the content (MoBA, arXiv 2502.13189)."""

    mixer: Literal["moba"]
    block: Positive = 64
    """Tokens in a block: a power of two."""
    top_k: Positive = 8
    """Blocks that a block of queries sees, its own among them."""

    def attention_pattern(self, num_kv_heads: int) -> MoBA:
        return MoBA(self.block, self.top_k)


AnyBlock = Annotated[
    FullBlock | S2Block | WindowBlock | StreamingBlock | PatternBlock | MoBABlock | LightningBlock, Field(discriminator="mixer")
]


class Layers(Section):
    blocks: dict[str, AnyBlock]
    """Named kinds of layer."""
    pattern: Annotated[list[str], Field(min_length=1)]
    """Names of blocks in order, repeated to the model's depth."""


class Model(Section):
    hidden_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive | None = None
    """Defaults to num_attention_heads."""
    head_dim: Positive | None = None
    """Defaults to hidden_size / num_attention_heads."""
    intermediate_size: Positive
    vocab_size: Positive | None = None
    """Defaults to the tokenizer's; the matrices are padded to a multiple of 128 and the padding is masked."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of initial weights; output projections take it divided by sqrt(2 * num_hidden_layers)."""
    tie_word_embeddings: bool = True
    layers: Layers

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def kv_channels(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def stack(self) -> list[Block]:
        """The block of every layer, bottom up."""
        names = self.layers.pattern
        return [self.layers.blocks[names[i % len(names)]] for i in range(self.num_hidden_layers)]

    @property
    def document_alignment(self) -> int:
        """Documents start at multiples of this: the largest block of the sparse patterns in use."""
        used = [self.layers.blocks[name] for name in self.layers.pattern[: self.num_hidden_layers]]
        softmax = [block for block in used if isinstance(block, SoftmaxBlock)]
        return max((block.attention_pattern(self.kv_heads).alignment for block in softmax), default=1)


class Data(Section):
    sources: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """Prefix of a .bin/.idx pair, or the embedded corpus python-stdlib, with its weight in the mixture."""
    validation: str | None = None
    """Prefix of held-out data; python-stdlib brings its own."""
    tokenizer: str = "bytes"
    """bytes, or the path of a Hugging Face tokenizer.json."""


class Training(Section):
    steps: Positive
    seq_length: Positive
    micro_batch_size: Positive = 1
    """Sequences per data-parallel rank and forward pass."""
    global_batch_size: Positive
    """Sequences per step, over all ranks."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and activations, with fp32 master weights; auto is bfloat16 on CUDA and float32 on CPU."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """0 for no clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do where the loss or the gradient norm is NaN or infinite; neither makes the update. stop also writes the batch
    to the run folder; skip goes on with the next."""
    max_skipped_steps: Positive = 10
    """Steps in a row that skip goes past before it stops."""


class Optimizer(Section):
    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)]
    betas: Annotated[tuple[Momentum, Momentum], Field(strict=False)] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Of matrices; vectors (norms) are not decayed."""


class Scheduler(Section):
    name: Literal["cosine", "wsd"] = "cosine"
    """wsd: warmup, stable, then linear decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_ratio: Fraction = 0.2
    """wsd: share of all steps in the final decay."""
    min_lr_factor: Fraction = 0.1
    """Share of the learning rate that is left at the end."""


class Parallel(Section):
    tp: Positive = 1
    """Tensor parallel: heads and MLP columns."""
    pp: Positive = 1
    """Pipeline parallel: layers."""
    cp: Positive = 1
    """Context parallel: the tokens of a sequence."""
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    """Which tokens a context-parallel rank holds: zigzag is the r-th part from either end, which balances causal work."""

    @property
    def model_ranks(self) -> int:
        """Ranks that share one data-parallel replica."""
        return self.tp * self.pp * self.cp


class Engine(Section):
    name: Literal["megatron"] = "megatron"


class Checkpoint(Section):
    interval: Annotated[int, Field(ge=0)] = 500
    """Steps between checkpoints; 0 for only at the end or a stop, which always write one."""
    keep_latest_k: Annotated[int, Field(ge=0)] = 3
    """How many to keep; 0 for all. 1 is refused: were it damaged, there would be none before it."""


class Evaluation(Section):
    interval: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations on held-out data; 0 for only at the end."""
    sequences: Positive = 16
    """Held-out sequences in an evaluation inside the run; the one at the end takes them all."""
    ngram_baseline: bool = False
    """At the end, also print what an order-2 byte model counted on the training data reaches; needs tokenizer bytes."""
    sample_prompt: str | None = None
    """At the end, print a sample that goes on from this text."""


class Metrics(Section):
    log_interval: Positive = 10
    """Steps between records in metrics.jsonl, and lines where there is no terminal."""
    wandb: bool = False
    wandb_project: str = "longspan"


class Launch(Section):
    processes: Positive = 1
    """Processes to start on this machine; under torchrun, all that it has started."""
    threads: Positive | None = None
    """CPU threads per process; by default the cores divided by the processes."""


class Recipe(Section):
    description: str = ""
    """One line, shown by `longspan recipes`."""
    run_dir: Annotated[str, Field(min_length=1)]
    """Folder of the run: recipe, metrics, checkpoints, weights, plots."""
    model: Model
    data: Data
    training: Training
    optimizer: Optimizer
    lr_scheduler: Scheduler = Scheduler()
    parallel: Parallel = Parallel()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    metrics: Metrics = Metrics()
    launch: Launch = Launch()

    @property
    def data_parallel(self) -> int:
        """Data-parallel replicas."""
        return self.launch.processes // self.parallel.model_ranks

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.training.seq_length

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        problems = [*_model_problems(self.model), *_training_problems(self)]
        if problems:
            raise CombinationError(problems)
        return self


class CombinationError(ValueError):
    """Keys that are each legal and together impossible: ``(key, reason and fix)`` pairs."""

    def __init__(self, problems: list[tuple[str, str]]):
        super().__init__(problems)
        self.problems = problems


def _model_problems(model: Model):
    blocks, heads, kv_heads = model.layers.blocks, model.num_attention_heads, model.kv_heads
    known = ", ".join(blocks)
    for name in dict.fromkeys(model.layers.pattern):
        if name not in blocks:
            yield "model.layers.pattern", f"names no block: {name!r}; the blocks are {known}"
    for name, block in blocks.items():
        key = f"model.layers.blocks.{name}"
        if name not in model.layers.pattern:
            yield key, "is not in model.layers.pattern; name it there or remove it"
        if isinstance(block, SoftmaxBlock):
            yield from ((f"{key}.{field}", reason) for field, reason in _pattern_problems(block, kv_heads))
        if isinstance(block, LightningBlock) and (heads * model.kv_channels) % (block.num_heads or heads):
            yield f"{key}.num_heads", f"{block.num_heads} does not divide the width, {heads * model.kv_channels}"
        if isinstance(block, SoftmaxBlock) and model.kv_channels * block.rotary_fraction % 2:
            dims = model.kv_channels * block.rotary_fraction
            yield f"{key}.rotary_fraction", f"rotates {dims:g} of {model.kv_channels} dims; it must be an even number"
    if model.head_dim is None and model.hidden_size % heads:
        yield "model.num_attention_heads", f"{heads} does not divide hidden_size {model.hidden_size}; set head_dim"
    if heads % kv_heads:
        yield "model.num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}"


def _pattern_problems(block: SoftmaxBlock, kv_heads: int) -> Iterator[tuple[str, str]]:
    try:
        pattern = block.attention_pattern(kv_heads)
    except ValueError as error:
        if isinstance(block, PatternBlock):
            yield "pattern", str(error)
        else:  # a pattern's own refusal begins with what it refuses: S2.block must be ...
            field, reason = str(error).partition(".")[2].split(" ", 1)
            yield field, reason
        return
    for per_head in _per_heads(pattern):
        if (per_head.first_head, len(per_head.patterns)) != (0, kv_heads):
            reason = f"PerHead lists {len(per_head.patterns)} patterns and the model has {kv_heads} KV heads"
            yield "pattern", f"{reason}; list one for each, from head 0"
    if isinstance(block, S2Block) and block.dense_heads > kv_heads:
        yield "dense_heads", f"{block.dense_heads} is more than the {kv_heads} KV heads"


def _per_heads(pattern: Pattern) -> Iterator[PerHead]:
    """All that an expression has, however deep."""
    if isinstance(pattern, PerHead):
        yield pattern
    for part in pattern.parts if isinstance(pattern, Union) else pattern.patterns if isinstance(pattern, PerHead) else ():
        yield from _per_heads(part)


def _training_problems(recipe: Recipe):
    model, training, parallel = recipe.model, recipe.training, recipe.parallel
    splits = {
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.intermediate_size,
    }
    for name, block in model.layers.blocks.items():
        if isinstance(block, LightningBlock) and block.num_heads:
            splits[f"layers.blocks.{name}.num_heads"] = block.num_heads
    for key, count in splits.items():
        if count % parallel.tp:
            yield "parallel.tp", f"{parallel.tp} does not divide model.{key} {count}"
    if 128 % parallel.tp:
        yield "parallel.tp", f"{parallel.tp} does not divide 128, to whose multiple the vocabulary is padded"
    if model.num_hidden_layers % parallel.pp:
        yield "parallel.pp", f"{parallel.pp} does not divide model.num_hidden_layers {model.num_hidden_layers}"
    try:
        align = model.document_alignment
    except (KeyError, ValueError):  # of unknown blocks and faulty patterns, which are problems of the model
        align = 1
    if training.seq_length % align:
        yield "training.seq_length", f"{training.seq_length} is not a multiple of the patterns' largest block, {align}"
    if recipe.evaluation.ngram_baseline and (recipe.data.tokenizer != "bytes" or model.vocab_size):
        yield "evaluation.ngram_baseline", "counts bytes: needs data.tokenizer bytes and no model.vocab_size; set it to false"
    # Zigzag has two parts per rank; Megatron splits each rank's tokens over tp, and its pipeline needs equal shapes.
    parts = parallel.cp * parallel.tp * (2 if parallel.layout == "zigzag" and parallel.cp > 1 else 1)
    if training.seq_length % parts:
        yield (
            "training.seq_length",
            f"{training.seq_length} does not split into {parts} equal parts for parallel.cp {parallel.cp} ({parallel.layout}) "
            f"and tp {parallel.tp}; use {training.seq_length + -training.seq_length % math.lcm(parts, align)}",
        )
    for name, block in model.layers.blocks.items():
        shard = training.seq_length * parallel.tp // parts
        if isinstance(block, MoBABlock) and parallel.cp > 1 and shard % block.block:
            yield (
                "training.seq_length",
                f"{training.seq_length} gives context-parallel ranks parts of {shard} tokens, which are not whole blocks of "
                f"model.layers.blocks.{name}: use a multiple of {parts // parallel.tp * block.block}",
            )
    if recipe.checkpoint.keep_latest_k == 1:
        yield "checkpoint.keep_latest_k", "1 would leave nothing to go back to if it is damaged; use 2 or more, or 0 for all"
    processes = recipe.launch.processes
    if processes % parallel.model_ranks:
        yield (
            "launch.processes",
            f"{processes} is not a multiple of parallel.tp * cp * pp = {parallel.model_ranks}; use {parallel.model_ranks}",
        )
    elif training.global_batch_size % (ranks := recipe.data_parallel * training.micro_batch_size):
        yield (
            "training.global_batch_size",
            f"{training.global_batch_size} is not a multiple of training.micro_batch_size {training.micro_batch_size} x "
            f"{recipe.data_parallel} data-parallel ranks = {ranks}",
        )
