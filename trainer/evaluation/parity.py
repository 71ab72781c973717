"""Whether a recipe's layers do over context-parallel ranks what they do on one: small models of the same patterns, looked at
closely.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...parallel import Sequence
from ..data.batches import Microbatch
from ..engines.megatron import MegatronEngine
from ..errors import UserError
from ..predict.communication import recipe_layout
from ..recipe.check import check_recipe
from ..recipe.schema import Recipe

VOCABULARY = 256
LOSS, GRADIENT = 1e-6, 1e-4
"""How far a loss may be from that of one rank, and a gradient in norm, relative."""
STACK = "all together"
_LEAST = 256  # tokens


def shrink(recipe: Recipe, cp: int) -> Recipe:
    """The same layers, heads and patterns with fewer channels, over as few tokens as show the patterns' structure."""
    content = recipe.model_dump(mode="json")
    model, training = content["model"], content["training"]
    telling = [block.telling_length(recipe.model.kv_heads) for block in recipe.model.stack]
    length = max([_LEAST, *telling])
    unit = 4 * cp * recipe.model.document_alignment
    training |= {
        "seq_length": -(-length // unit) * unit,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "dtype": "float32",
    }
    content["data"] = {"sources": {"python-stdlib": 1.0}}
    content["evaluation"] = {}
    content["launch"] = {"processes": cp, "threads": 1}
    content["parallel"] |= {"cp": cp, "tp": 1, "pp": 1, "ep": 1, "sequence_parallel": False}
    content |= {"engine": {"name": "megatron"}, "stages": []}
    model |= {"vocab_size": None, "intermediate_size": 64, "initializer_range": 0.1}
    if model["moe"]:
        shared = model["moe"]["shared_expert_intermediate_size"]
        model["moe"] |= {"intermediate_size": 64, "shared_expert_intermediate_size": shared and 64}
    sizes = sorted({64, 128, 256, 512, recipe.model.hidden_size})
    dims = sorted({8, 16, 32, 64, recipe.model.kv_channels})
    for hidden in sizes:
        for dim in dims:
            try:
                return check_recipe(
                    {**content, "model": {**model, "hidden_size": hidden, "head_dim": dim}},
                    "verify",
                )
            except UserError:  # the last sizes are the recipe's own
                continue
    return check_recipe(content, "verify")


def cases(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """One layer of each block that is used, by its name, and last all of them in one model."""
    names = list(dict.fromkeys(recipe.model.stack_names))
    for name, pattern in [*((name, [name]) for name in names), (STACK, names)]:
        blocks = {each: recipe.model.layers.blocks[each] for each in pattern}
        layers = recipe.model.layers.model_copy(update={"blocks": blocks, "pattern": pattern})
        yield (
            name,
            recipe.model_copy(
                update={
                    "model": recipe.model.model_copy(
                        update={"layers": layers, "num_hidden_layers": len(pattern)}
                    )
                }
            ),
        )


def documents_of(recipe: Recipe) -> Tensor:
    """Ids int32 ``[1, time]``: a document that ends where a rank's part does, one inside a part, and one over all others."""
    length, align = recipe.training.seq_length, recipe.model.document_alignment
    edge = recipe_layout(recipe).segments_in_order[0].stop
    starts = edge, edge + align
    ids = np.zeros((1, length), np.int32)
    for start in starts:
        ids[:, start:] += 1
    return torch.from_numpy(ids)


@dataclass
class Observation:
    """What one arrangement of ranks did; on the first rank alone."""

    loss: float
    gradients: dict[str, Tensor]
    changed: dict[int, Tensor]
    """For each token that was replaced, which positions' logits changed: bool ``[time]``."""


def measure_ranks(recipe: Recipe, documents: Tensor, probes: list[int]) -> Observation | None:
    """Loss, gradients and probes of a recipe's model; every rank calls it, within a process group of ``parallel.cp`` ranks."""
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(
        VOCABULARY, (2, 1, recipe.training.seq_length), generator=generator
    )
    engine = MegatronEngine(recipe, VOCABULARY)
    try:
        layout, rank = recipe_layout(recipe), engine.batch_shard.context_rank

        def batch(tokens: Tensor) -> Microbatch:
            weights = (torch.arange(tokens.shape[1]) % 7 > 0).float()[None]
            own = (layout.shard(x, rank) for x in (tokens, labels, weights))
            return Microbatch(*own, Sequence(layout, rank, documents), 0)

        def logits(tokens: Tensor) -> Tensor:
            one = batch(tokens)
            with torch.no_grad():
                own = engine.model(one.tokens, None, None, packed_seq_params=one.sequence)
            parts: list = [None] * layout.ranks
            dist.all_gather_object(parts, own)
            return layout.unshard(parts)

        loss, count = engine.evaluate(batch(tokens))
        gradients = engine.gradients([batch(tokens)])
        whole, changed = logits(tokens), {}
        for probe in probes:
            other = tokens.clone()
            other[0, probe] = (other[0, probe] + 1) % VOCABULARY
            changed[probe] = (logits(other) != whole).any(-1)[0]
        return Observation(loss / count, gradients, changed) if dist.get_rank() == 0 else None
    finally:
        engine.close()


def probes_of(recipe: Recipe, documents: Tensor) -> list[int]:
    """Positions to replace: documents' first and last tokens, either side of the edges between ranks, some in between."""
    edges = [segment.start for segment in recipe_layout(recipe).segments_in_order][1:]
    begins = (documents[0].diff() != 0).nonzero().flatten().tolist()
    length = documents.shape[1]
    wanted = {
        0,
        length // 3,
        length - 2,
        *begins,
        *(at + 1 for at in begins),
        *edges,
        *(at - back for at in edges for back in (1, 2)),
    }
    return sorted(at for at in wanted if 0 <= at < length)


def may_see(recipe: Recipe, documents: Tensor, probe: int) -> tuple[Tensor, Tensor]:
    """Which positions may see token ``probe``, and which surely do: bool ``[time]``."""
    ids = documents[0].numpy()
    positions = np.arange(len(ids))
    may = (ids == ids[probe]) & (positions >= probe)
    must = positions == probe  # by the residual stream
    if len(recipe.model.stack) == 1:
        (block,) = recipe.model.stack
        start = int((ids == ids[probe]).argmax())
        visible = block.visibility(recipe.model, positions - start, probe - start)
        may, must = may & visible.may, may & visible.must
    return torch.from_numpy(may), torch.from_numpy(must)


def find_leak(recipe: Recipe, documents: Tensor, changed: dict[int, Tensor]) -> str | None:
    """What is wrong with the probes' answers: a position that saw what it must not, or did not see what it must."""
    for probe, found in changed.items():
        may, must = may_see(recipe, documents, probe)
        for wrong, what in (
            (found & ~may, "changes, and must not"),
            (must & ~found, "does not change, and must"),
        ):
            if wrong.any():
                return f"with token {probe} position {int(wrong.nonzero()[0])} {what} ({int(wrong.sum())} such)"
    return None
