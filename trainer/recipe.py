"""What a recipe may say. Nothing here imports torch: a recipe is checked before any process starts."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..attention.patterns import Pattern, PerHead, Union
from .blocks import (
    Block,
    Fraction,
    FullBlock,
    MoBABlock,
    Momentum,
    PatternBlock,
    Positive,
    S2Block,
    Section,
    SoftmaxBlock,
    StreamingBlock,
    WindowBlock,
)
from .context_parallel import schedule_problems
from .linear_blocks import (
    BasedBlock,
    ConvolutionBlock,
    DeltaNetBlock,
    GatedDeltaNetBlock,
    GLABlock,
    HedgehogBlock,
    KDABlock,
    LightningBlock,
    LinearAttentionBlock,
    LinearBlock,
    Mamba2Block,
    RetentionBlock,
    SimpleGLABlock,
)

AnyBlock = Annotated[
    FullBlock
    | S2Block
    | WindowBlock
    | StreamingBlock
    | PatternBlock
    | MoBABlock
    | LinearBlock
    | LightningBlock
    | RetentionBlock
    | SimpleGLABlock
    | GLABlock
    | BasedBlock
    | HedgehogBlock
    | Mamba2Block
    | DeltaNetBlock
    | GatedDeltaNetBlock
    | KDABlock
    | ConvolutionBlock,
    Field(discriminator="mixer"),
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
        return [self.layers.blocks[name] for name in self.stack_names]

    @property
    def stack_names(self) -> list[str]:
        """The name of the block of every layer."""
        names = self.layers.pattern
        return [names[i % len(names)] for i in range(self.num_hidden_layers)]

    @property
    def document_alignment(self) -> int:
        """Documents start at multiples of this: the largest block of the sparse patterns in use."""
        used = [self.layers.blocks[name] for name in self.layers.pattern[: self.num_hidden_layers]]
        softmax = [block for block in used if isinstance(block, SoftmaxBlock)]
        return max((block.attention_pattern(self.kv_heads).alignment for block in softmax), default=1)


class MQAR(Section):
    """Multi-query associative recall (Zoology, arXiv 2312.04927): pairs of a key and a value, then each key is asked for."""

    pairs: Annotated[list[Positive], Field(min_length=1)]
    """How many pairs an example may have, drawn evenly."""
    vocab_size: Positive
    """Keys are from 1 up to half of it, values from there on."""
    power_a: Annotated[float, Field(gt=0)] = 0.01
    """The i-th place after the pairs is asked at with a chance that goes with i ** (power_a - 1): mostly the first ones."""
    random_fillers: bool = False
    """What lies between the questions: any tokens (Based, arXiv 2402.18668) instead of 0."""
    held_out: Positive = 512
    """Examples of the held-out data, which come from a stream of their own."""

    @property
    def keys(self) -> int:
        """How many there are; an example has none twice."""
        return max(0, self.vocab_size // 2 - 1)

    @property
    def values(self) -> int:
        return self.vocab_size - self.vocab_size // 2


class Data(Section):
    """Text, as ``sources``, or a task that is made as it is asked for: exactly one of them."""

    sources: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
    """Prefix of a .bin/.idx pair, or the embedded corpus python-stdlib, with its weight in the mixture."""
    mqar: MQAR | None = None
    """The recall task."""
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
    schedule: str = "auto"
    """How context-parallel ranks share softmax attention: stripes, ring, gather, heads, grid, or one of the grid as in
    "heads 4 x ring"; auto is the one that moves the least."""
    schedules: dict[str, str] = Field(default_factory=dict)
    """The same for single blocks of model.layers, by their names."""

    def schedule_of(self, block: str) -> str:
        """That of the block of that name."""
        return self.schedules.get(block, self.schedule)

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
        problems = [*_model_problems(self.model), *_data_problems(self), *_training_problems(self)]
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
        if isinstance(block, LinearAttentionBlock) and model.kv_channels:  # a head without dims is told of below
            try:
                block.design(model)
            except ValueError as error:
                field, reason = str(error).split(" ", 1)
                yield f"{key}.{field}", reason
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


def _data_problems(recipe: Recipe) -> Iterator[tuple[str, str]]:
    data, task, length = recipe.data, recipe.data.mqar, recipe.training.seq_length
    if task is None:
        if data.sources is None:
            yield "data.sources", "is required, or data.mqar in its place"
        return
    if data.sources is not None:
        yield "data.mqar", "is given beside data.sources; set one of the two to null"
    most = max(task.pairs)
    if most > task.keys:
        yield "data.mqar.vocab_size", f"{task.vocab_size} has {task.keys} keys for {most} pairs; use at least {2 * most + 2}"
    if 4 * most > length:
        reason = f"{most} pairs and their questions take {4 * most} tokens, training.seq_length is {length}"
        yield "data.mqar.pairs", f"{reason}; use at most {length // 4} pairs, or longer sequences"
    if length % 2:
        yield "training.seq_length", f"{length} is odd, but data.mqar fills places of two tokens; use {length + 1}"
    if recipe.model.vocab_size not in (None, task.vocab_size):
        yield "model.vocab_size", f"{recipe.model.vocab_size} is not that of data.mqar, {task.vocab_size}; remove it"
    if data.tokenizer != "bytes":
        yield "data.tokenizer", "means nothing to data.mqar, whose tokens are no text; remove it"
    if data.validation is not None:
        yield "data.validation", "means nothing to data.mqar, which makes its own held-out data; remove it"
    if recipe.evaluation.sample_prompt is not None:
        yield "evaluation.sample_prompt", "needs text to go on from, and data.mqar has none; remove it"


def _linear_splits(block: Block, model: Model) -> Iterator[tuple[str, int]]:
    """What tensor parallelism splits of a linear mixer."""
    if not isinstance(block, LinearAttentionBlock):
        return
    try:
        design = block.design(model)
    except ValueError:  # a problem of the model
        return
    yield "num_key_heads" if design.key_heads != design.heads else "num_heads", design.key_heads
    if design.decay_rank:
        yield "decay_rank" if isinstance(block, GLABlock) else "value_head_dim", design.decay_rank


def _training_problems(recipe: Recipe):
    model, training, parallel = recipe.model, recipe.training, recipe.parallel
    splits = {
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.intermediate_size,
    }
    for name, block in model.layers.blocks.items():
        splits |= {f"layers.blocks.{name}.{key}": count for key, count in _linear_splits(block, model)}
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
    if recipe.evaluation.ngram_baseline and (recipe.data.mqar or recipe.data.tokenizer != "bytes" or model.vocab_size):
        needs = "data.sources of data.tokenizer bytes, and no model.vocab_size"
        yield "evaluation.ngram_baseline", f"counts bytes: needs {needs}; set it to false"
    # Zigzag has two parts per rank; Megatron splits each rank's tokens over tp, and its pipeline needs equal shapes.
    parts = parallel.cp * parallel.tp * (2 if parallel.layout == "zigzag" and parallel.cp > 1 else 1)
    if training.seq_length % parts:
        yield (
            "training.seq_length",
            f"{training.seq_length} does not split into {parts} equal parts for parallel.cp {parallel.cp} ({parallel.layout}) "
            f"and tp {parallel.tp}; use {training.seq_length + -training.seq_length % math.lcm(parts, align)}",
        )
    yield from schedule_problems(model, parallel)
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
