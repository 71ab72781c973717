"""Whether a recipe's layers compute over context-parallel ranks what they compute on one: small
models of the same patterns, measured closely.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...parallel import Sequence
from ..data.batches import Microbatch
from ..engines.megatron import MegatronEngine
from ..errors import UserError
from ..layers.softmax_mixer import SoftmaxAttention
from ..predict.communication import recipe_layout
from ..recipe.check import check_recipe
from ..recipe.schema import Recipe

VOCABULARY = 256
NAN_TOKEN = VOCABULARY - 1
"""The id of a token whose embedding is NaN in some probes, and which is in no text."""
MAX_LOSS_ERROR, MAX_GRADIENT_ERROR = 1e-6, 1e-4
"""How far a loss may be from that of one rank, and a gradient in norm, relative."""
STACK = "all together"
"""The name of the case with one layer of each block."""
_MIN_TOKENS = 256
_MAX_TOKENS = 2**16
"""Patterns that reach further than this and than the recipe's sequences are shown in part."""


def shrink(recipe: Recipe, cp: int) -> Recipe:
    """Return a recipe with the same layers, heads and patterns but fewer channels, over as few
    tokens as show the patterns' structure, on ``cp`` context-parallel ranks.
    """
    content = recipe.model_dump(mode="json")
    model = content["model"]
    content |= {
        "data": {"sources": {"python-stdlib": 1.0}},
        "evaluation": {},
        "launch": {"processes": cp, "threads": 1},
        "engine": {"name": "megatron"},
        "stages": [],
    }
    content["parallel"] |= {"cp": cp, "tp": 1, "pp": 1, "ep": 1, "sequence_parallel": False}
    content["training"] |= {
        "seq_length": _telling_length(recipe, cp),
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "dtype": "float32",
    }
    model |= {"vocab_size": None, "intermediate_size": 64, "initializer_range": 0.1}
    if model["moe"]:
        has_shared_expert = model["moe"]["shared_expert_intermediate_size"]
        model["moe"] |= {
            "intermediate_size": 64,
            "shared_expert_intermediate_size": 64 if has_shared_expert else None,
        }
    return _with_least_channels(content, recipe)


def _telling_length(recipe: Recipe, cp: int) -> int:
    """Return a length that shows what all layers do, and that ranks and documents divide."""
    model = recipe.model
    lengths = [block.telling_length(model.kv_heads) for block in model.stack]
    unit = 4 * cp * model.document_alignment
    longest = max(_MAX_TOKENS, recipe.training.seq_length)
    return -(-min(longest, max(_MIN_TOKENS, *lengths)) // unit) * unit


def _with_least_channels(content: dict, recipe: Recipe) -> Recipe:
    """Return the recipe with the smallest sizes that its layers allow; the last are its own."""
    hidden_sizes = sorted({64, 128, 256, 512, recipe.model.hidden_size})
    head_dims = sorted({8, 16, 32, 64, recipe.model.kv_channels})
    for hidden_size in hidden_sizes:
        for head_dim in head_dims:
            sizes = {"hidden_size": hidden_size, "head_dim": head_dim}
            try:
                return check_recipe({**content, "model": {**content["model"], **sizes}}, "verify")
            except UserError:
                continue
    return check_recipe(content, "verify")


def cases(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yield one layer of each block in use, by its name, and last all of them in one model."""
    names = list(dict.fromkeys(recipe.model.stack_names))
    for name in names:
        yield name, _with_stack(recipe, [name])
    yield STACK, _with_stack(recipe, names)


def _with_stack(recipe: Recipe, names: list[str]) -> Recipe:
    """Return the recipe with one layer of each of these blocks."""
    layers = recipe.model.layers
    blocks = {name: layers.blocks[name] for name in names}
    layers = layers.model_copy(update={"blocks": blocks, "pattern": names})
    changes = {"layers": layers, "num_hidden_layers": len(names)}
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})


def documents_of(recipe: Recipe) -> Tensor:
    """Return ids int32 ``[1, time]`` of three documents: one ends where a rank's part does, one
    inside a part, and one spans all others.
    """
    length = recipe.training.seq_length
    alignment = recipe.model.document_alignment
    edge = recipe_layout(recipe).segments_in_order[0].stop
    ids = np.zeros((1, length), np.int32)
    ids[:, edge:] += 1
    ids[:, edge + alignment :] += 1
    return torch.from_numpy(ids)


@dataclass
class Observation:
    """What a model does on one rank, or on several."""

    loss: float
    gradients: dict[str, Tensor]
    changed: dict[int, Tensor]
    """For each token that was replaced, the positions whose logits changed: bool ``[time]``."""
    leaks: list[str]
    """What changed, and must not, when many tokens were replaced: see :func:`find_many_leaks`."""


def measure_ranks(recipe: Recipe, documents: Tensor, probes: list[int]) -> Observation | None:
    """Return loss, gradients and probes of a recipe's model, on the first rank and None elsewhere.

    Every rank calls it, within a process group of ``parallel.cp`` ranks.
    """
    generator = torch.Generator().manual_seed(1)
    shape = (2, 1, recipe.training.seq_length)
    tokens, labels = torch.randint(NAN_TOKEN, shape, generator=generator)
    engine = MegatronEngine(recipe, VOCABULARY)
    try:
        layout = recipe_layout(recipe)
        rank = engine.batch_shard.context_rank

        def batch_of(tokens: Tensor) -> Microbatch:
            weights = (torch.arange(tokens.shape[1]) % 7 > 0).float()[None]
            return Microbatch(
                tokens=layout.shard(tokens, rank),
                labels=layout.shard(labels, rank),
                weights=layout.shard(weights, rank),
                sequence=Sequence(layout, rank, documents),
                padding=0,
            )

        def logits_of(tokens: Tensor) -> Tensor:
            batch = batch_of(tokens)
            with torch.no_grad():
                local = engine.model(batch.tokens, None, None, packed_seq_params=batch.sequence)
            parts: list = [None] * layout.ranks
            dist.all_gather_object(parts, local)
            return layout.unshard(parts)

        batch = batch_of(tokens)
        loss_sum, count = engine.evaluate(batch)
        gradients = engine.gradients([batch])
        logits = logits_of(tokens)
        changed = {}
        for probe in probes:
            replaced = tokens.clone()
            replaced[0, probe] = (replaced[0, probe] + 1) % NAN_TOKEN
            changed[probe] = (logits_of(replaced) != logits).any(-1)[0]

        sharpen(engine.model)
        leaks = find_many_leaks(tokens, documents, recipe.model.document_alignment, logits_of)
    finally:
        engine.close()
    if gradients is None:
        return None
    return Observation(loss_sum / count, gradients, changed, leaks)


def probes_of(recipe: Recipe, documents: Tensor) -> list[int]:
    """Return the positions to replace: documents' first and last tokens, those on either side of
    the edges between ranks, and some in between.
    """
    length = documents.shape[1]
    edges = [segment.start for segment in recipe_layout(recipe).segments_in_order][1:]
    last_tokens = (documents[0].diff() != 0).nonzero().flatten().tolist()
    positions = {0, length // 3, length - 2}
    for position in last_tokens:
        positions |= {position, position + 1}
    for edge in edges:
        positions |= {edge - 2, edge - 1, edge}
    return sorted(position for position in positions if 0 <= position < length)


def may_see(recipe: Recipe, documents: Tensor, probe: int) -> tuple[Tensor, Tensor]:
    """Return which positions may depend on token ``probe``, and which must: bool ``[time]``."""
    ids = documents[0].numpy()
    positions = np.arange(len(ids))
    may = (ids == ids[probe]) & (positions >= probe)
    must = positions == probe  # by the residual stream
    if len(recipe.model.stack) == 1:
        (block,) = recipe.model.stack
        start = int((ids == ids[probe]).argmax())
        visible = block.visibility(recipe.model, positions - start, probe - start)
        must = may & visible.must
        may = may & visible.may
    return torch.from_numpy(may), torch.from_numpy(must)


def find_leak(recipe: Recipe, documents: Tensor, changed: dict[int, Tensor]) -> str | None:
    """Return what is wrong with the probes' answers, or None: a position that saw what it must not,
    or did not see what it must.
    """
    for probe, positions in changed.items():
        may, must = may_see(recipe, documents, probe)
        for wrong, problem in (
            (positions & ~may, "changes, and must not"),
            (must & ~positions, "does not change, and must"),
        ):
            if wrong.any():
                first = int(wrong.nonzero()[0])
                count = int(wrong.sum())
                return f"with token {probe} replaced, position {first} {problem} ({count} in all)"
    return None


_SHARPER = {"linear_in.weight": 3.0, "q_layernorm.weight": 5.0, "q_norm.weight": 5.0}
"""Factors that turn the flat softmax of initial weights into a peaked one: its logits then have a
standard deviation of about 5."""
_MOST_ROUNDING = 1e-9
"""Change of a logit in fp64, relative to the largest, that may be rounding."""


def sharpen(model: torch.nn.Module) -> None:
    """Turn a model to fp64 with peaked softmax attention, and NaN for the embedding of NAN_TOKEN.

    In flat attention a leak of single keys is lost among all others. Linear attention keeps its
    weights: larger ones would make it forget at once, which hides leaks.
    """
    model.double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SoftmaxAttention):
                for name, parameter in module.named_parameters():
                    parameter *= _SHARPER.get(name, 1.0)
        for name, parameter in model.named_parameters():
            if name.endswith("word_embeddings.weight"):
                parameter[NAN_TOKEN] = torch.nan


def find_many_leaks(
    tokens: Tensor, documents: Tensor, alignment: int, logits_of: Callable[[Tensor], Tensor]
) -> list[str]:
    """Replace many tokens at a time, and return what changes before them or in other documents.

    A leak through a choice of keys only shows when a choice turns, which single tokens seldom
    do. So all tokens from some place on are replaced, at places inside of blocks; then all tokens
    of a document; and then some of its tokens are NaN, which a factor of 0 does not hide.

    Args:
        tokens: int64 ``[1, time]``.
        documents: ids ``[1, time]``.
        alignment: tokens in the largest block.
        logits_of: the model on whole sequences, ``[1, time, vocabulary]``; a collective.
    """
    ids = documents[0]
    positions = torch.arange(len(ids))
    other_tokens = (tokens + 1 + tokens.flip(1) % (NAN_TOKEN - 1)) % NAN_TOKEN  # all differ
    expected = logits_of(tokens)

    def leak(what: str, replaced: Tensor, may_change: Tensor) -> str | None:
        logits = logits_of(replaced)
        # A tied embedding makes the logit of NAN_TOKEN itself NaN.
        difference = (logits - expected)[0, :, :NAN_TOKEN].abs().amax(-1)  # [time]
        is_same = difference <= _MOST_ROUNDING * expected[..., :NAN_TOKEN].abs().max()
        wrong = (~is_same & ~may_change).nonzero().flatten()
        if len(wrong):
            return f"with {what}, position {int(wrong[0])} changes ({len(wrong)} in all)"
        if is_same[may_change].all():
            return f"with {what}, nothing changes"
        return None

    leaks = []
    for first in _places_inside_blocks(ids, alignment):
        replaced = torch.where(positions < first, tokens, other_tokens)
        leaks.append(leak(f"all tokens from {first} on replaced", replaced, positions >= first))
    for document in ids.unique():
        is_inside = ids == document
        replaced = torch.where(is_inside, other_tokens, tokens)
        leaks.append(leak(f"all tokens of document {document} replaced", replaced, is_inside))

        # At the edges, where convolutions reach over them, and in the middle.
        inside = is_inside.nonzero().flatten()
        with_nan = tokens.clone()
        with_nan[0, inside[[0, len(inside) // 2, -1]]] = NAN_TOKEN
        leaks.append(leak(f"NaN in document {document}", with_nan, is_inside))
    return [text for text in leaks if text is not None]


def _places_inside_blocks(ids: Tensor, alignment: int) -> list[int]:
    """Return five places over the last document, none of them at the edge of a block."""
    start = int((ids == ids[-1]).int().argmax())
    length = len(ids) - start
    places = [start + length * n // 6 for n in range(1, 6)]
    return [place + (alignment > 1 and (place - start) % alignment == 0) for place in places]


@dataclass(frozen=True)
class Comparison:
    """How far several ranks are from one, for one case."""

    leak: str | None
    """What is wrong with what positions see, on several ranks or on one."""
    loss_error: float
    """Relative."""
    gradient_error: float
    """Of the worst gradient: norm of the difference, relative."""
    worst_gradient: str

    @property
    def problem(self) -> str | None:
        """What is wrong, or None."""
        is_close = (
            self.loss_error <= MAX_LOSS_ERROR and self.gradient_error <= MAX_GRADIENT_ERROR
        )  # False for NaN
        if self.leak or is_close:
            return self.leak
        return (
            f"loss or gradients are further than {MAX_LOSS_ERROR:g} and {MAX_GRADIENT_ERROR:g} "
            "from one rank"
        )


def compare(
    case: Recipe, documents: Tensor, one_rank: Observation, ranks: Observation
) -> Comparison:
    """Compare what several ranks did with what one did."""
    errors = {
        name: _relative_distance(ranks.gradients[name], expected)
        for name, expected in one_rank.gradients.items()
    }
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    leaks = [
        find_leak(case, documents, ranks.changed),
        find_leak(case, documents, one_rank.changed),
        *ranks.leaks,
        *one_rank.leaks,
    ]
    return Comparison(
        leak=next((leak for leak in leaks if leak), None),
        loss_error=abs(ranks.loss - one_rank.loss) / abs(one_rank.loss),
        gradient_error=errors[worst],
        worst_gradient=worst,
    )


def _relative_distance(tensor: Tensor, expected: Tensor) -> float:
    return float((tensor - expected).norm() / expected.norm().clamp(min=1e-30))
