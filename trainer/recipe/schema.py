"""What a recipe may say.

Nothing here imports torch: a recipe is checked before any process starts. The strings after fields
are the text of ``docs/recipe-keys.md``.
"""

from collections import Counter
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PrivateAttr,
    SerializationInfo,
    field_validator,
)

from ..layers.base import Block, HeadCount, LayerCount, Momentum, Positive, RankCount, Section
from ..layers.registry import AnyBlock
from ..paths import escape_path, expand_path
from .engine_config import AnyEngine, MegatronConfig
from .extension import WhenExtended
from .learning_rate import LRSchedulerConfig

FOR_A_FILE = "for a file"
"""Context of a dump that goes to a recipe file, where paths are written so that they are read as
they are.
"""


def _path_for_dump(path: str, info: SerializationInfo) -> str:
    return escape_path(path) if info.context == FOR_A_FILE else path


UserPath = Annotated[
    str, Field(min_length=1), AfterValidator(expand_path), PlainSerializer(_path_for_dump)
]
"""A path in which ``~`` and variables are replaced when the recipe is read."""


class LayersConfig(Section):
    blocks: dict[str, AnyBlock]
    """Kinds of layer, under names of your own."""
    pattern: Annotated[list[str], Field(min_length=1)]
    """Names of blocks from the bottom up, repeated to the model's depth."""


class MoEConfig(Section):
    """The experts of blocks with mlp: moe."""

    num_experts: Annotated[int, Field(ge=2)]
    """Number of experts in each of these layers."""
    num_experts_per_tok: Positive = 2
    """Number of experts that a token goes to."""
    intermediate_size: Positive | None = None
    """Width of an expert; defaults to the model's intermediate_size."""
    shared_expert_intermediate_size: Positive | None = None
    """Width of an expert that all tokens go to as well; null for none."""
    shared_expert_gate: bool = False
    """Multiply the shared expert's output by a sigmoid of a projection of its input (Qwen)."""
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts sum to 1: the softmax is then over these alone."""
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.001
    """Weight of the loss that balances tokens over experts (Switch Transformer, arXiv 2101.03961),
    computed for each microbatch."""

    def parameter_count(self, hidden_size: int, default_width: int, per_token: bool = False) -> int:
        """Count the parameters of a layer's router and experts, or only those that a token meets.

        Args:
            default_width: the model's ``intermediate_size``.
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
    num_hidden_layers: LayerCount
    """Number of layers, each a mixer and an MLP."""
    num_attention_heads: HeadCount
    """Number of query heads."""
    num_key_value_heads: HeadCount | None = None
    """Number of key and value heads, which groups of query heads share; defaults to
    num_attention_heads."""
    head_dim: Positive | None = None
    """Dims of a head; defaults to hidden_size / num_attention_heads."""
    intermediate_size: Positive
    """Width of the gated MLP."""
    vocab_size: Positive | None = None
    """Number of token ids; defaults to the tokenizer's. The matrices are padded to a multiple of
    128, and the padding is masked."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    """Base of the rotary angles; longer sequences need a larger one."""
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mean square in norms."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of initial weights; that of output projections is divided by
    sqrt(2 * num_hidden_layers)."""
    tie_word_embeddings: bool = True
    """Whether the output matrix is the embedding matrix."""
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
        return [names[layer % len(names)] for layer in range(self.num_hidden_layers)]

    @property
    def document_alignment(self) -> int:
        """Documents start at multiples of this: the largest block of the sparse patterns in use."""
        names = self.layers.pattern[: self.num_hidden_layers]
        return max(self.layers.blocks[name].document_alignment(self.kv_heads) for name in names)


class MQARConfig(Section):
    """Multi-query associative recall (Zoology, arXiv 2312.04927): pairs of a key and a value, then
    a question for each key.
    """

    pairs: Annotated[list[Positive], Field(min_length=1)]
    """Numbers of pairs that an example may have, all equally likely."""
    vocab_size: Positive
    """Number of token ids: keys are from 1 up to half of it, values from there on."""
    power_a: Annotated[float, Field(gt=0)] = 0.01
    """Places after the pairs have questions with a probability proportional to
    i ** (power_a - 1), where i counts places: mostly the first ones."""
    random_fillers: bool = False
    """Fill the places between questions with random tokens (Based, arXiv 2402.18668) instead of
    0."""
    held_out: Positive = 512
    """Number of held-out examples, drawn from a random stream of their own."""

    @property
    def keys(self) -> int:
        """Number of different keys; an example has none twice."""
        return max(0, self.vocab_size // 2 - 1)

    @property
    def values(self) -> int:
        """Number of different values."""
        return self.vocab_size - self.vocab_size // 2


class BucketsConfig(Section):
    """For packing: buckets, sequences of several lengths with one document each (Dataset
    Decomposition, arXiv 2405.13226).
    """

    shortest: Positive = 256
    """Shortest length in tokens; the others are this times powers of two, up to
    training.seq_length."""
    odds: Literal["uniform", "grow_linear", "grow_p2", "grow_p100", "shrink_p100"] = "grow_p2"
    """How a step draws its length from those left in the cycle; with grow_p2, a length is twice as
    likely as the next longer one."""
    cycle_steps: Positive = 256
    """Steps of a cycle, which has every length in proportion to its tokens."""


class RunTokenizer(NamedTuple):
    """The tokenizer of a run that exists. It belongs to the run, not to what a recipe says."""

    file: str
    identity: str | None
    """What the file must be, as its SHA-256; None if nothing says so."""
    reads_special_tokens: bool
    """Whether a corpus of the run was built with special tokens that its text spells."""


class DataConfig(Section):
    """Text, as ``sources``, or a task whose examples are generated: exactly one of them."""

    sources: (
        Annotated[dict[UserPath, Annotated[float, Field(gt=0)]], Field(min_length=1)] | None
    ) = None
    """Prefixes of .bin/.idx pairs, or the built-in corpus python-stdlib, with their weights in the
    mixture."""
    mqar: MQARConfig | None = None
    """The recall task."""
    validation: UserPath | None = None
    """Prefix of held-out data; python-stdlib has its own."""
    tokenizer: UserPath = "bytes"
    """bytes, or the path of a Hugging Face tokenizer.json."""
    packing: Literal["concat", "best_fit", "buckets"] = "concat"
    """How documents become sequences. concat: end to end, cut where a sequence ends. best_fit: only
    documents longer than a sequence are cut. buckets: one document per sequence, in several
    lengths."""
    buckets: BucketsConfig = BucketsConfig()

    @field_validator("sources", mode="before")
    @classmethod
    def _refuse_one_source_twice(cls, sources: Any) -> Any:
        """Refuse names that are the same once expanded: one weight would be lost."""
        names = sources if isinstance(sources, dict) else {}
        counts = Counter(expand_path(name) for name in names if isinstance(name, str))
        for name, count in counts.items():
            if count > 1:
                raise ValueError(f"names {name} {count} times; add up the weights")
        return sources

    _run_tokenizer: RunTokenizer | None = PrivateAttr(None)

    @property
    def run_tokenizer(self) -> RunTokenizer | None:
        """The tokenizer of the run whose recipe this is; None before there is a run."""
        return self._run_tokenizer

    @property
    def tokenizer_file(self) -> str:
        """The word bytes, or the file to read the tokenizer from."""
        return self._run_tokenizer.file if self._run_tokenizer else self.tokenizer

    def with_run_tokenizer(self, tokenizer: RunTokenizer) -> "DataConfig":
        """Return this section, which reads that tokenizer."""
        section = self.model_copy()
        section._run_tokenizer = tokenizer
        return section


TrainingDtype = Literal["float32", "bfloat16", "float16"]


def auto_dtype(capability: int | None) -> TrainingDtype:
    """Return the type of weights and activations that suits a device best.

    Args:
        capability: compute capability of the GPU, 90 for 9.0, 0 for one of AMD's; None for a CPU.
    """
    if capability is None:
        return "float32"
    return "float16" if 0 < capability < 80 else "bfloat16"


class TrainingConfig(Section):
    steps: Positive
    """Number of weight updates in the whole run."""
    lr_when_extended: WhenExtended = "hold"
    """What the learning rate does when steps of a run that has begun is raised. hold: the schedule
    ends where it would have, and the other steps keep the rate of its end. rewarm: a schedule like
    the first begins, with its warmup. stretch: the schedule of the larger number of steps, at once;
    after the end of a schedule, the rate jumps up."""
    seq_length: Positive
    """Tokens in a sequence, over all context-parallel ranks."""
    micro_batch_size: Positive = 1
    """Sequences per data-parallel rank and forward pass."""
    global_batch_size: Positive
    """Sequences per step, over all ranks."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations, with fp32 master weights; auto is bfloat16 on CUDA, float16
    on GPUs without it (before compute capability 8.0), and float32 on CPU. Under float16 the loss
    is scaled so that small gradients do not become 0; steps whose gradients overflow are skipped,
    and the scale falls."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of initial weights and of the order of the data."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients with a larger norm are scaled down to it; 0 for no clipping."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if the loss or the gradient norm is NaN or infinite; neither updates the weights.
    stop also writes the batch to the run folder; skip continues with the next step."""
    max_skipped_steps: Positive = 10
    """Number of consecutive steps that skip may skip before it stops."""

    def dtype_on(self, capability: int | None) -> TrainingDtype:
        """Return the type of weights and activations on a device; see :func:`auto_dtype`."""
        return auto_dtype(capability) if self.dtype == "auto" else self.dtype


class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    """AdamW (arXiv 1711.05101)."""
    lr: Annotated[float, Field(gt=0)]
    """Learning rate at its peak."""
    betas: Annotated[tuple[Momentum, Momentum], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the running means of gradients and of their squares."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the mean square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decay of matrices; vectors (norms) do not decay."""


class ParallelConfig(Section):
    tp: RankCount = 1
    """Tensor parallel: ranks that split heads and MLP columns."""
    pp: RankCount = 1
    """Pipeline parallel: ranks that split layers."""
    cp: RankCount = 1
    """Context parallel: ranks that split the tokens of a sequence."""
    ep: RankCount = 1
    """Expert parallel: ranks that split experts; apart from these they hold other sequences or
    other tokens."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks also split the tokens of norms and residuals (Megatron's
    sequence parallel)."""
    layout: Literal["zigzag", "contiguous"] = "zigzag"
    """Which tokens a context-parallel rank holds; zigzag: rank r holds the r-th part from either
    end, which balances causal work."""
    schedule: str = "auto"
    """How context-parallel ranks share softmax attention: stripes, ring, gather, heads, grid, or
    one grid as in "heads 4 x ring"; auto is the one that moves the least
    among those that spread the work evenly."""
    schedules: dict[str, str] = Field(default_factory=dict)
    """The schedules of single blocks of model.layers, by their names."""

    def schedule_of(self, block_name: str) -> str:
        """Return the KV schedule of the block with that name."""
        return self.schedules.get(block_name, self.schedule)

    @property
    def model_ranks(self) -> int:
        """Ranks that share one data-parallel replica."""
        return self.tp * self.pp * self.cp


Recompute = Literal["none", "selective", "full"]


class MemoryConfig(Section):
    """What long sequences need. None of it changes what is learned."""

    loss_tile: Positive = 1024
    """Number of a rank's tokens whose logits exist at a time."""
    mlp_tile: Positive | None = None
    """Number of a rank's tokens that go through an MLP at a time; each tile is computed again in
    the backward pass. null for all tokens."""
    recompute: Recompute = "none"
    """What layers compute again in the backward pass instead of keeping it. selective: all but the
    mixer's operation. full: the whole layer."""
    recompute_blocks: dict[str, Recompute] = Field(default_factory=dict)
    """The same for single blocks of model.layers, by their names."""
    offload_inputs: bool = False
    """Whether the inputs of the layers wait in host memory; needs full recompute."""

    def recompute_of(self, block_name: str) -> Recompute:
        """Return what layers of the block with that name recompute."""
        return self.recompute_blocks.get(block_name, self.recompute)


class InitialConfig(Section):
    """Initial weights from a Hugging Face model."""

    path: UserPath
    """Folder of the model."""
    new: list[str] = Field(default_factory=list)
    """Parameters that the folder lacks and that begin as the seed says: their names, or patterns
    like decoder.layers.*.mixer.*."""
    unused: list[str] = Field(default_factory=list)
    """Parameters of the folder that the recipe's model does not have."""


class CheckpointConfig(Section):
    interval: Annotated[int, Field(ge=0)] = 500
    """Steps between checkpoints; 0 for none but those at the end and at a stop, which are always
    written."""
    keep_latest_k: Annotated[int, Field(ge=0)] = 3
    """Number of checkpoints to keep; 0 for all. 1 is refused: if it were damaged, there would be
    none before it."""


class EvaluationConfig(Section):
    interval: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations on held-out data; 0 for one at the end."""
    sequences: Positive = 16
    """Held-out sequences in an evaluation during the run; the one at the end uses them all."""
    ngram_baseline: bool = False
    """At the end, also print the loss of an order-2 byte model counted on the training data; needs
    tokenizer bytes."""
    sample_prompt: str | None = None
    """At the end, print a sample that continues this text."""


class MetricsConfig(Section):
    log_interval: Positive = 10
    """Steps between records in metrics.jsonl, and between lines if there is no terminal."""
    tensorboard: bool = False
    """Also write to tensorboard/ in the run folder."""
    wandb: bool = False
    """Also write to W&B, offline if there is no account."""
    wandb_project: str = "longspan"
    """Name of the project in W&B."""


class LaunchConfig(Section):
    processes: RankCount = 1
    """Processes to start on this machine; under torchrun, all that it has started."""
    threads: Positive | None = None
    """CPU threads per process; defaults to the cores divided by the processes."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """If data, a step, an evaluation or the writing of a checkpoint takes longer than this, the
    ranks report where each of them is, and exit."""

    @property
    def collective_timeout_s(self) -> float:
        """Seconds that a collective may wait for other ranks.

        NCCL and gloo end the process then and name no rank: the report above must come first.
        """
        return 2 * self.hang_timeout_s


class StageTrainingConfig(Section):
    seq_length: Positive | None = None
    """Tokens in a sequence."""
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
    """What changes from a step on; all else stays as it is."""

    from_step: Positive
    """Number of steps before it."""
    training: StageTrainingConfig = StageTrainingConfig()
    model: StageModelConfig = StageModelConfig()
    optimizer: StageOptimizerConfig = StageOptimizerConfig()
    lr_scheduler: LRSchedulerConfig | None = None
    """A schedule that begins with this stage; without it the previous one continues, with this
    stage's optimizer.lr as its peak."""
    data: DataConfig | None = None
    """Replaces the whole section."""

    @property
    def changes_data(self) -> bool:
        """Whether its sequences are not those that would have come next: they then have an order of
        their own.
        """
        return bool(self.data or self.training.seq_length or self.training.global_batch_size)


def _changed(section: Section, change: Section) -> Section:
    """Return the section with the keys that ``change`` sets."""
    return section.model_copy(update=change.model_dump(exclude_none=True))


def _path_as_section(value: Any) -> Any:
    """Let a recipe give the path alone."""
    return {"path": value} if isinstance(value, str) else value


class Recipe(Section):
    description: str = ""
    """One line, shown by `longspan recipes`."""
    run_dir: UserPath
    """Folder of the run: recipe, metrics, checkpoints, weights, plots. In this path and in all
    others, ~ and variables like $SCRATCH are replaced when the recipe is read."""
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    initial: Annotated[InitialConfig | None, BeforeValidator(_path_as_section)] = None
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
    """Changes during the run, in the order of their from_step."""

    @property
    def stage_starts(self) -> list[int]:
        """The step (from 0) at which each stage begins; the first is the recipe itself, at 0."""
        return [0, *(stage.from_step for stage in self.stages)]

    def with_run_tokenizer(self, tokenizer: RunTokenizer) -> "Recipe":
        """Return this recipe, whose every stage reads that tokenizer."""
        stages = [
            stage.model_copy(update={"data": stage.data.with_run_tokenizer(tokenizer)})
            if stage.data
            else stage
            for stage in self.stages
        ]
        data = self.data.with_run_tokenizer(tokenizer)
        return self.model_copy(update={"data": data, "stages": stages})

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
        """Number of data-parallel replicas."""
        return self.launch.processes // self.parallel.model_ranks

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.training.seq_length
