"""What every kind of layer knows of itself.

Nothing here imports torch: a recipe is checked before any process starts.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ...attention.errors import InvalidField
from ...attention.patterns import Pattern, Rule, Selector

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from ...attention.backend_choice import BackendChoice

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
# Far more than any model has, and few enough to look at each of them.
LayerCount = Annotated[int, Field(gt=0, le=10_000)]
HeadCount = Annotated[int, Field(gt=0, le=65_536)]
RankCount = Annotated[int, Field(gt=0, le=1_048_576)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Scales = Annotated[tuple[float, float], Field(strict=False)]  # YAML has lists, no tuples

Shapes = dict[str, tuple[int, ...]]
"""Shapes of whole parameters, before tensor parallelism splits them, by name within a mixer."""


class Section(BaseModel):
    """A section of a recipe: unknown keys and values of another type are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSizes(Protocol):
    """The sizes of the model around a layer.

    A recipe's model section has them; :class:`.mixer.MegatronSizes` are those of a Megatron config.
    """

    @property
    def hidden_size(self) -> int: ...

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values in softmax attention."""

    @property
    def kv_channels(self) -> int:
        """Dims of a head of softmax attention."""


class MixerContext(NamedTuple):
    """Which layer of which model a mixer is built for."""

    config: Any
    """Megatron's ``TransformerConfig``."""
    process_groups: Any
    """Megatron's ``ProcessGroupCollection``."""
    sizes: ModelSizes
    layer: int
    """From 0, in the whole model."""
    rope_theta: float
    kv_schedule: str
    """How context-parallel ranks share softmax attention, as :func:`longspan.parallel.attend`
    accepts it."""
    recomputes: bool
    """Whether all but the operation between the projections is computed again in the backward
    pass."""


class ContextSplit(NamedTuple):
    """How a sequence is split over context-parallel ranks, as far as messages depend on it."""

    ranks: int
    segments: int
    """Runs of consecutive tokens on the rank that has most of them."""
    state_steps: int
    """Messages in which the states of linear attention pass all ranks."""
    tensor_ranks: int


class GPUCall(NamedTuple):
    """How a rank of some ranks calls a mixer's operation on a GPU."""

    empty: "Callable[..., Tensor]"
    """``torch.empty`` on that GPU, without memory; nothing can be computed with its tensors."""
    batch: int
    tokens: int
    dtype: "torch.dtype"
    """Of activations."""
    tensor_ranks: int
    context_ranks: int

    def activations(self, *sizes: int) -> "Tensor":
        """Return a tensor ``[batch, time, *sizes]``."""
        return self.empty(self.batch, self.tokens, *sizes, dtype=self.dtype)


class Visibility(NamedTuple):
    """Which positions of a document depend on one of its tokens: bool ``[positions]``."""

    may: np.ndarray
    """Those that are allowed to."""
    must: np.ndarray
    """Those that surely do, whatever the weights; a part of ``may``."""


class Block(Section):
    """What every kind of layer has: the places of its norms, and how its two halves join the
    residual stream.
    """

    norm: Literal["pre", "post", "sandwich", "reordered"] = "pre"
    """pre: x + f(norm(x)). post: n + f(n) with n = norm(x) (MiniMax, DeepNorm). sandwich:
    x + norm(f(norm(x))) (Gemma). reordered: x + norm(f(x)) (OLMo 2)."""
    mixer_residual: Scales = (1.0, 1.0)
    """Scales of the residual stream and of the mixer's output where they are added."""
    mlp_residual: Scales = (1.0, 1.0)
    """Scales of the residual stream and of the MLP's output where they are added."""
    mlp: Literal["dense", "moe"] = "dense"
    """moe: the experts of model.moe in place of one MLP."""
    mlp_activation: Literal["silu", "identity"] = "silu"
    """Activation of the MLP's gate: silu is SwiGLU, identity is TransNormerLLM's SGLU (arXiv
    2307.14995)."""

    @classmethod
    def kind(cls) -> str:
        """Return the word that chooses this kind in a recipe: the value of its key ``mixer``."""
        (word,) = get_args(cls.model_fields["mixer"].annotation)
        return word

    @property
    def norm_names(self) -> tuple[str, ...]:
        """The layer's norms outside of its mixer, each over the hidden size."""
        before = ("input_layernorm", "pre_mlp_layernorm")
        after = ("post_mixer_layernorm", "post_mlp_layernorm")
        return {"pre": before, "post": before, "sandwich": before + after, "reordered": after}[
            self.norm
        ]

    @property
    def norms_each_head(self) -> bool:
        """Whether its mixer has Megatron's ``q_layernorm`` and ``k_layernorm``."""
        return False

    # The module

    @abstractmethod
    def build_mixer(self, context: MixerContext) -> Any:
        """Build the module that computes this block; import here what needs torch.

        Returns:
            A :class:`.mixer.Mixer` whose parameters are those of :meth:`parameter_shapes`.
        """

    @abstractmethod
    def parameter_shapes(self, model: ModelSizes, layer: int) -> Shapes:
        """Return the shape of every parameter of the mixer of layer ``layer`` (from 0).

        The module is built from it, parameters are counted with it and an exported model has
        tensors of these shapes.
        """

    def parameter_count(self, model: ModelSizes, layer: int) -> int:
        """Count the parameters of the mixer of layer ``layer`` (from 0)."""
        return sum(math.prod(shape) for shape in self.parameter_shapes(model, layer).values())

    def backend_choices(self, model: ModelSizes, call: GPUCall) -> "list[BackendChoice]":
        """Return which backends compute its operation on a GPU, and why no faster ones.

        They choose for themselves, shown tensors without numbers; import here what needs torch.

        Returns:
            One for each kind of call; none if the mixer has no operation with backends.
        """
        return []

    # What it costs

    @abstractmethod
    def mixing_flops(self, model: ModelSizes, length: int, layer: int) -> float:
        """Return the operations per token beyond a product with every parameter.

        They are those of the forward pass, the mean over a sequence of ``length`` tokens.
        """

    def flops_per_token(self, model: ModelSizes, length: int, layer: int) -> float:
        """Return the operations per token of the mixer's forward pass.

        The mean over a sequence of ``length`` tokens; a multiplication and an addition are two.
        """
        projections = 2.0 * self.parameter_count(model, layer)
        return projections + self.mixing_flops(model, length, layer)

    @abstractmethod
    def state_numbers(self, model: ModelSizes, length: int, layer: int) -> int:
        """Count the numbers that ``length`` tokens leave behind for the next token to read."""

    @abstractmethod
    def exchanged_bytes(self, model: ModelSizes, layer: int, split: ContextSplit) -> float:
        """Return the bytes that a context-parallel rank receives besides keys and values.

        For one sequence, forward and backward; states are fp32, activations bf16.
        """

    def projected_numbers(self, model: ModelSizes, layer: int) -> float:
        """Estimate how many numbers per token the input projections give.

        They are kept for the backward pass.
        """
        width = model.num_attention_heads * model.kv_channels
        return self.parameter_count(model, layer) / model.hidden_size - width

    # What a recipe may say

    def problems(self, model: ModelSizes) -> Iterator[InvalidField]:
        """Yield what is wrong with this block in such a model.

        Each problem has one of the block's keys as its field, and a reason that ends in a fix.
        """
        yield from ()

    def tensor_parallel_splits(self, model: ModelSizes) -> dict[str, int]:
        """Return the sizes that tensor parallelism splits, besides the model's heads.

        By the keys of this block they come from.
        """
        return {}

    @property
    def rank_block(self) -> int:
        """Context-parallel ranks must hold a multiple of this number of tokens."""
        return 1

    # What a token sees

    @property
    def has_kv_schedule(self) -> bool:
        """Whether context-parallel ranks exchange keys and values by a KV schedule.

        If so, :meth:`attention_pattern` returns a pattern, and the recipe may name the schedule.
        """
        return False

    def attention_pattern(self, num_kv_heads: int) -> Pattern | Selector | None:
        """Return what the heads of the whole model see, or None if this is no softmax attention.

        Raises:
            ValueError: the block's keys make no pattern.
        """
        return None

    def rules(self, num_kv_heads: int) -> list[Rule]:
        """Return the rules of all KV heads, which say what they see; none if no pattern does so
        before the text is known.
        """
        return []

    def document_alignment(self, num_kv_heads: int) -> int:
        """Return the number of tokens at whose multiples documents must start."""
        pattern = self.attention_pattern(num_kv_heads)
        return 1 if pattern is None else pattern.alignment

    def leaves_gaps(self, num_kv_heads: int) -> bool:
        """Return whether it sees far, and yet some positions are only seen from nearby."""
        return False

    def saved_run_problem(self) -> str | None:
        """Return why a saved run with this block cannot be used any longer, or None if it can.

        Asked of the recipe in a run folder, in which every key of that time is written out.
        """
        return None

    def visibility(self, model: ModelSizes, positions: np.ndarray, source: int) -> Visibility:
        """Return which positions depend on the token at position ``source`` of their document.

        All positions count from the start of the document; those before ``source`` are ignored.
        """
        return Visibility(positions >= source, positions == source)

    def telling_length(self, num_kv_heads: int) -> int:
        """Return the length of a sequence that shows all that the mixer does; 0 for any."""
        return 0

    # How it leaves for Hugging Face

    @abstractmethod
    def exported(self, model: ModelSizes, layer: int) -> dict[str, Any]:
        """Return the section ``mixer`` of layer ``layer`` (from 0) in an exported model's config.

        ``kind`` names the class of the exported code; the rest is what that class must know.
        """

    def export_problem(self) -> str | None:
        """Return why no exported code can compute this block, or None if it can."""
        return None

    def export_source(self) -> str | None:
        """Return the source of the exported module, or None if ``modeling_longspan.py`` has it.

        It is Python that imports only torch and transformers and defines a class
        ``Mixer(config, options)`` with ``forward(hidden, positions, state)``, like the mixers of
        that file; ``options`` is what :meth:`exported` returns. Its parameters have the names of
        :meth:`parameter_shapes`, but ``in_proj`` and ``out_proj`` for ``linear_in`` and
        ``linear_proj``.
        """
        return None
