"""What a recipe may say. Nothing here imports torch: a recipe is checked before any process starts."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..layers.base import Block, Momentum, Positive, Section
from ..layers.registry import AnyBlock
from .engine_config import AnyEngine, MegatronConfig
from .learning_rate import LRSchedulerConfig


class LayersConfig(Section):
    blocks: dict[str, AnyBlock]
    """Named kinds of layer."""
    pattern: Annotated[list[str], Field(min_length=1)]
    """Names of blocks in order, repeated to the model's depth."""


class MoEConfig(Section):
    """The experts of blocks with mlp: moe."""

    num_experts: Annotated[int, Field(ge=2)]
    """Of each layer that has them."""
    num_experts_per_tok: Positive = 2
    """Experts that a token goes to."""
    intermediate_size: Positive | None = None
    """Of an expert; defaults to the model's."""
    shared_expert_intermediate_size: Positive | None = None
    """Of an expert that all tokens go to as well; null for none."""
    shared_expert_gate: bool = False
    """Multiply the shared expert's output by a sigmoid of a projection of its input (Qwen)."""
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts add up to 1: the softmax is then over these alone."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.001
    """Weight of the loss that asks for equally many tokens at each expert (Switch Transformer, arXiv 2101.03961), reckoned over
    a microbatch."""

    def parameter_count(self, hidden_size: int, default_width: int, per_token: bool = False) -> int:
        """Count the parameters of a layer's router and experts; ``per_token`` those alone that a
        token meets. ``default_width`` is the model's ``intermediate_size``.
        """
        width = self.intermediate_size or default_width
        experts = self.num_experts_per_tok if per_token else self.num_experts
        router = self.num_experts * hidden_size
        shared = 3 * hidden_size * (self.shared_expert_intermediate_size or 0)
        shared_gate = hidden_size if self.shared_expert_gate else 0
        return experts * 3 * hidden_size * width + router + shared + shared_gate


class ModelConfig(Section):
    hidden_size: Positive
    """Width of the residual stream."""
    num_hidden_layers: Positive
    """Layers, each a mixer and an MLP."""
    num_attention_heads: Positive
    """Query heads."""
    num_key_value_heads: Positive | None = None
    """Heads of keys and values, which groups of query heads share; defaults to num_attention_heads."""
    head_dim: Positive | None = None
    """Defaults to hidden_size / num_attention_heads."""
    intermediate_size: Positive
    """Width of a gated MLP."""
    vocab_size: Positive | None = None
    """Defaults to the tokenizer's; the matrices are padded to a multiple of 128 and the padding is masked."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary angles; larger ones reach farther."""
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mean square in norms."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of initial weights; output projections take it divided by sqrt(2 * num_hidden_layers)."""
    tie_word_embeddings: bool = True
    """Whether the output takes the embedding's matrix."""
    moe: MoEConfig | None = None
    layers: LayersConfig

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
        names = self.layers.pattern[: self.num_hidden_layers]
        return max(self.layers.blocks[name].document_alignment(self.kv_heads) for name in names)


class MQARConfig(Section):
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


class BucketsConfig(Section):
    """Of packing buckets: sequences of one document each, of several lengths (Dataset Decomposition, arXiv 2405.13226)."""

    shortest: Positive = 256
    """Tokens; the lengths are this times powers of two, up to training.seq_length."""
    odds: Literal["uniform", "grow_linear", "grow_p2", "grow_p100", "shrink_p100"] = "grow_p2"
    """How likely a step takes a length of those that its cycle still has to give: grow_p2 a length twice as likely as that of
    twice as many tokens."""
    cycle_steps: Positive = 256
    """Steps of a cycle, which has every length in proportion to its tokens."""


class DataConfig(Section):
    """Text, as ``sources``, or a task that is made as it is asked for: exactly one of them."""

    sources: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
    """Prefix of a .bin/.idx pair, or the embedded corpus python-stdlib, with its weight in the mixture."""
    mqar: MQARConfig | None = None
    """The recall task."""
    validation: str | None = None
    """Prefix of held-out data; python-stdlib brings its own."""
    tokenizer: str = "bytes"
    """bytes, or the path of a Hugging Face tokenizer.json."""
    packing: Literal["concat", "best_fit", "buckets"] = "concat"
    """How documents become sequences. concat: end to end, cut where a sequence ends. best_fit: cut only where they are longer
    than one. buckets: each sequence of one document, in several lengths."""
    buckets: BucketsConfig = BucketsConfig()


class TrainingConfig(Section):
    steps: Positive
    """Updates of the weights in the whole run."""
    seq_length: Positive
    """Tokens of a sequence, over all context-parallel ranks."""
    micro_batch_size: Positive = 1
    """Sequences per data-parallel rank and forward pass."""
    global_batch_size: Positive
    """Sequences per step, over all ranks."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and activations, with fp32 master weights; auto is bfloat16 on CUDA and float32 on CPU."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of initial weights and of the order of the data."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients of a larger norm are scaled down to it; 0 for no clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do where the loss or the gradient norm is NaN or infinite; neither makes the update. stop also writes the batch
    to the run folder; skip goes on with the next."""
    max_skipped_steps: Positive = 10
    """Steps in a row that skip goes past before it stops."""


class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    """AdamW (arXiv 1711.05101)."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate at its peak."""
    betas: Annotated[tuple[Momentum, Momentum], Field(strict=False)] = (0.9, 0.95)
    """Of the running means of gradients and of their squares."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Of matrices; vectors (norms) are not decayed."""


class ParallelConfig(Section):
    tp: Positive = 1
    """Tensor parallel: heads and MLP columns."""
    pp: Positive = 1
    """Pipeline parallel: layers."""
    cp: Positive = 1
    """Context parallel: the tokens of a sequence."""
    ep: Positive = 1
    """Expert parallel: experts, over ranks that otherwise hold other sequences or other tokens."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks also share the tokens of norms and residuals (Megatron's sequence parallel)."""
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


Recompute = Literal["none", "selective", "full"]


class MemoryConfig(Section):
    """What long sequences need. None of it changes what is learned."""

    loss_tile: Positive = 1024
    """Tokens of a rank whose logits exist at a time."""
    mlp_tile: Positive | None = None
    """Tokens of a rank that go through an MLP at a time; each part is computed again in the backward pass. null for all."""
    recompute: Recompute = "none"
    """What layers compute again in the backward pass instead of keeping it: selective is all but the mixer's operation, full
    the whole layer."""
    recompute_blocks: dict[str, Recompute] = Field(default_factory=dict)
    """The same for single blocks of model.layers, by their names."""
    offload_inputs: bool = False
    """Whether the inputs of the layers wait in host memory; needs full recompute."""

    def recompute_of(self, block: str) -> str:
        """That of the block of that name."""
        return self.recompute_blocks.get(block, self.recompute)


class InitialConfig(Section):
    """Weights to begin with, of a Hugging Face model."""

    path: Annotated[str, Field(min_length=1)]
    """Its folder."""
    new: list[str] = Field(default_factory=list)
    """Parameters that it has not and that begin as the seed says: their names, or patterns as decoder.layers.*.mixer.*."""
    unused: list[str] = Field(default_factory=list)
    """Parameters of the folder that the recipe's model has no place for."""


class CheckpointConfig(Section):
    interval: Annotated[int, Field(ge=0)] = 500
    """Steps between checkpoints; 0 for only at the end or a stop, which always write one."""
    keep_latest_k: Annotated[int, Field(ge=0)] = 3
    """How many to keep; 0 for all. 1 is refused: were it damaged, there would be none before it."""


class EvaluationConfig(Section):
    interval: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations on held-out data; 0 for only at the end."""
    sequences: Positive = 16
    """Held-out sequences in an evaluation inside the run; the one at the end takes them all."""
    ngram_baseline: bool = False
    """At the end, also print what an order-2 byte model counted on the training data reaches; needs tokenizer bytes."""
    sample_prompt: str | None = None
    """At the end, print a sample that goes on from this text."""


class MetricsConfig(Section):
    log_interval: Positive = 10
    """Steps between records in metrics.jsonl, and lines where there is no terminal."""
    tensorboard: bool = False
    """Also to tensorboard/ in the run folder."""
    wandb: bool = False
    """Also to W&B, offline where there is no account."""
    wandb_project: str = "longspan"
    """Of W&B."""


class LaunchConfig(Section):
    processes: Positive = 1
    """Processes to start on this machine; under torchrun, all that it has started."""
    threads: Positive | None = None
    """CPU threads per process; by default the cores divided by the processes."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """Where data, a step, an evaluation or the writing of a checkpoint takes longer than this, the ranks say which of them
    is where, and end."""


class StageTrainingConfig(Section):
    seq_length: Positive | None = None
    """As in training, and so the others."""
    global_batch_size: Positive | None = None
    """Sequences per step."""
    micro_batch_size: Positive | None = None
    """Sequences per data-parallel rank and forward pass."""


class StageModelConfig(Section):
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    """Usually raised with the length."""


class StageOptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0)] | None = None
    """Learning rate at its peak."""


class StageConfig(Section):
    """What is different from a step on; all else stays as it is."""

    from_step: Positive
    """Steps that come before it."""
    training: StageTrainingConfig = StageTrainingConfig()
    model: StageModelConfig = StageModelConfig()
    optimizer: StageOptimizerConfig = StageOptimizerConfig()
    lr_scheduler: LRSchedulerConfig | None = None
    """Begins anew with this stage; without it the schedule before goes on, with this stage's optimizer.lr as its peak."""
    data: DataConfig | None = None
    """Replaces the whole section."""

    @property
    def changes_data(self) -> bool:
        """Whether its sequences are others than those that would have come next; they then have an order of their own."""
        return bool(self.data or self.training.seq_length or self.training.global_batch_size)


def _changed(section: Section, change: Section) -> Section:
    """Return the section with the keys that ``change`` sets."""
    return section.model_copy(update=change.model_dump(exclude_none=True))


def _path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Recipe(Section):
    description: str = ""
    """One line, shown by `longspan recipes`."""
    run_dir: Annotated[str, Field(min_length=1)]
    """Folder of the run: recipe, metrics, checkpoints, weights, plots."""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    initial: Annotated[InitialConfig | None, BeforeValidator(_path_alone)] = None
    """The folder alone, or {path: ..., new: [...], unused: [...]}."""
    optimizer: OptimizerConfig
    lr_scheduler: LRSchedulerConfig = LRSchedulerConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: AnyEngine = MegatronConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metrics: MetricsConfig = MetricsConfig()
    launch: LaunchConfig = LaunchConfig()
    stages: list[StageConfig] = Field(default_factory=list)
    """In the order of their from_step."""

    @property
    def stage_starts(self) -> list[int]:
        """The step (from 0) at which each stage begins, the recipe's own before all."""
        return [0, *(stage.from_step for stage in self.stages)]

    def at_step(self, step: int) -> "Recipe":
        """Return the recipe of the stage that step ``step`` (from 0) is in."""
        recipe = self
        for number, stage in enumerate(self.stages, 1):
            if stage.from_step <= step:
                recipe = recipe._with_stage(stage, number, self.training.seed)
        return recipe

    def _with_stage(self, stage: StageConfig, number: int, first_seed: int) -> "Recipe":
        """Return this recipe with the keys that a stage changes."""
        sections: dict[str, Section] = {
            "training": _changed(self.training, stage.training),
            "model": _changed(self.model, stage.model),
            "optimizer": _changed(self.optimizer, stage.optimizer),
        }
        if stage.changes_data:  # its data begin anew, and must not be those of step 0
            seed = {"seed": first_seed + number}
            sections["training"] = sections["training"].model_copy(update=seed)
        if stage.data:
            sections["data"] = stage.data
        if stage.lr_scheduler:
            sections["lr_scheduler"] = stage.lr_scheduler
        return self.model_copy(update=sections)

    @property
    def data_parallel(self) -> int:
        """Data-parallel replicas."""
        return self.launch.processes // self.parallel.model_ranks

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.training.seq_length
