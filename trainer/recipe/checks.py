"""What is wrong with a recipe although each of its keys is legal. Without torch."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..engines.deepspeed_config import deepspeed_problems
from ..errors import suggest
from ..predict.communication import schedule_problems

if TYPE_CHECKING:
    from .schema import ModelConfig, Recipe


def impossible(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    """(key, reason and fix) of every combination that cannot be."""
    yield from _model_problems(recipe.model)
    yield from _data_problems(recipe)
    yield from _training_problems(recipe)
    yield from _memory_problems(recipe)
    yield from deepspeed_problems(recipe)
    yield from _expert_problems(recipe)
    yield from _stage_problems(recipe)


def _model_problems(model: "ModelConfig"):
    blocks, heads, kv_heads = model.layers.blocks, model.num_attention_heads, model.kv_heads
    known = ", ".join(blocks)
    for name in dict.fromkeys(model.layers.pattern):
        if name not in blocks:
            yield "model.layers.pattern", f"names no block: {name!r}; the blocks are {known}"
    for name, block in blocks.items():
        key = f"model.layers.blocks.{name}"
        if name not in model.layers.pattern:
            yield key, "is not in model.layers.pattern; name it there or remove it"
        for problem in block.problems(model):
            yield f"{key}.{problem.field}", problem.reason
    if model.head_dim is None and model.hidden_size % heads:
        yield (
            "model.num_attention_heads",
            f"{heads} does not divide hidden_size {model.hidden_size}; set head_dim",
        )
    if heads % kv_heads:
        yield "model.num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}"


def _data_problems(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    data, task, length = recipe.data, recipe.data.mqar, recipe.training.seq_length
    if task is None:
        if data.sources is None:
            yield "data.sources", "is required, or data.mqar in its place"
        if data.packing == "buckets":
            yield from _bucket_problems(recipe)
        return
    if data.packing != "concat":
        yield (
            "data.packing",
            "means nothing to data.mqar, whose examples are no documents; remove it",
        )
    if data.sources is not None:
        yield "data.mqar", "is given beside data.sources; set one of the two to null"
    most = max(task.pairs)
    if most > task.keys:
        yield (
            "data.mqar.vocab_size",
            f"{task.vocab_size} has {task.keys} keys for {most} pairs; use at least {2 * most + 2}",
        )
    if 4 * most > length:
        reason = f"{most} pairs and their questions take {4 * most} tokens, training.seq_length is {length}"
        yield "data.mqar.pairs", f"{reason}; use at most {length // 4} pairs, or longer sequences"
    if length % 2:
        yield (
            "training.seq_length",
            f"{length} is odd, but data.mqar fills places of two tokens; use {length + 1}",
        )
    if recipe.model.vocab_size not in (None, task.vocab_size):
        yield (
            "model.vocab_size",
            f"{recipe.model.vocab_size} is not that of data.mqar, {task.vocab_size}; remove it",
        )
    if data.tokenizer != "bytes":
        yield "data.tokenizer", "means nothing to data.mqar, whose tokens are no text; remove it"
    if data.validation is not None:
        yield (
            "data.validation",
            "means nothing to data.mqar, which makes its own held-out data; remove it",
        )
    if recipe.evaluation.sample_prompt is not None:
        yield (
            "evaluation.sample_prompt",
            "needs text to go on from, and data.mqar has none; remove it",
        )


def _parts(recipe: "Recipe") -> int:
    """Equal parts of a sequence: zigzag has two a rank; Megatron splits each rank's tokens over tp, and its pipeline needs
    equal shapes.
    """
    parallel = recipe.parallel
    return parallel.cp * parallel.tp * (2 if parallel.layout == "zigzag" and parallel.cp > 1 else 1)


def _training_problems(recipe: "Recipe"):
    model, training, parallel = recipe.model, recipe.training, recipe.parallel
    splits = {
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.intermediate_size,
    }
    for name, block in model.layers.blocks.items():
        splits |= {
            f"layers.blocks.{name}.{key}": count
            for key, count in block.tensor_parallel_splits(model).items()
        }
    for key, count in splits.items():
        if count % parallel.tp:
            yield "parallel.tp", f"{parallel.tp} does not divide model.{key} {count}"
    if 128 % parallel.tp:
        yield (
            "parallel.tp",
            f"{parallel.tp} does not divide 128, to whose multiple the vocabulary is padded",
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        yield (
            "parallel.sequence_parallel",
            "shares tokens among tensor-parallel ranks, and parallel.tp is 1; remove it",
        )
    if model.num_hidden_layers % parallel.pp:
        yield (
            "parallel.pp",
            f"{parallel.pp} does not divide model.num_hidden_layers {model.num_hidden_layers}",
        )
    try:
        align = model.document_alignment
    except (
        KeyError,
        ValueError,
    ):  # of unknown blocks and faulty patterns, which are problems of the model
        align = 1
    if training.seq_length % align:
        yield (
            "training.seq_length",
            f"{training.seq_length} is not a multiple of the patterns' largest block, {align}",
        )
    if recipe.evaluation.ngram_baseline and (
        recipe.data.mqar or recipe.data.tokenizer != "bytes" or model.vocab_size
    ):
        needs = "data.sources of data.tokenizer bytes, and no model.vocab_size"
        yield "evaluation.ngram_baseline", f"counts bytes: needs {needs}; set it to false"
    parts = _parts(recipe)
    if training.seq_length % parts:
        yield (
            "training.seq_length",
            f"{training.seq_length} does not split into {parts} equal parts for parallel.cp {parallel.cp} ({parallel.layout}) "
            f"and tp {parallel.tp}; use {training.seq_length + -training.seq_length % math.lcm(parts, align)}",
        )
    yield from schedule_problems(model, parallel)
    for name, block in model.layers.blocks.items():
        shard = training.seq_length * parallel.tp // parts
        if parallel.cp > 1 and shard % block.rank_block:
            yield (
                "training.seq_length",
                f"{training.seq_length} gives context-parallel ranks parts of {shard} tokens, which are not whole blocks of "
                f"model.layers.blocks.{name}: use a multiple of {parts // parallel.tp * block.rank_block}",
            )
    if recipe.checkpoint.keep_latest_k == 1:
        yield (
            "checkpoint.keep_latest_k",
            "1 would leave nothing to go back to if it is damaged; use 2 or more, or 0 for all",
        )
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


def _memory_problems(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    memory, blocks = recipe.memory, recipe.model.layers.blocks
    for name in memory.recompute_blocks:
        if name not in blocks:
            yield (
                f"memory.recompute_blocks.{name}",
                f"names no block{suggest(name, list(blocks))}; known: {', '.join(blocks)}",
            )
    kept = [name for name in blocks if memory.recompute_of(name) != "full"]
    if memory.offload_inputs and kept:
        reason = (
            f"block {kept[0]} keeps more than its input (recompute {memory.recompute_of(kept[0])})"
        )
        yield "memory.offload_inputs", f"{reason}; set memory.recompute to full"


def _expert_problems(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    model, parallel, moe = recipe.model, recipe.parallel, recipe.model.moe
    with_experts = [name for name, block in model.layers.blocks.items() if block.mlp == "moe"]
    if with_experts and moe is None:
        yield (
            f"model.layers.blocks.{with_experts[0]}.mlp",
            "is moe, but model.moe, which says how many experts, is missing",
        )
    if moe is None:
        if parallel.ep > 1:
            yield "parallel.ep", f"{parallel.ep} has no experts to share; set model.moe, or 1"
        return
    if not with_experts:
        yield "model.moe", "is used by no block; set mlp: moe in one, or remove it"
    if moe.num_experts_per_tok > moe.num_experts:
        yield (
            "model.moe.num_experts_per_tok",
            f"{moe.num_experts_per_tok} is more than the {moe.num_experts} experts",
        )
    if moe.shared_expert_gate and moe.shared_expert_intermediate_size is None:
        yield (
            "model.moe.shared_expert_gate",
            "gates no expert; set model.moe.shared_expert_intermediate_size",
        )
    for name in with_experts:
        if model.layers.blocks[name].mlp_activation != "silu":
            yield f"model.layers.blocks.{name}.mlp_activation", "of experts is silu; remove it"
    if recipe.memory.mlp_tile and with_experts:
        reason = (
            f"{recipe.memory.mlp_tile} would balance the experts of {with_experts[0]} tile by tile"
        )
        yield "memory.mlp_tile", f"{reason}; remove it, and take memory.recompute"
    for size, split in (
        ("intermediate_size", parallel.ep == 1),
        ("shared_expert_intermediate_size", True),
    ):
        if split and (getattr(moe, size) or 0) % parallel.tp:
            yield (
                "parallel.tp",
                f"{parallel.tp} does not divide model.moe.{size} {getattr(moe, size)}",
            )
    if moe.num_experts % parallel.ep:
        yield (
            "parallel.ep",
            f"{parallel.ep} does not divide model.moe.num_experts {moe.num_experts}",
        )
    shared = recipe.launch.processes // parallel.pp // (1 if parallel.ep > 1 else parallel.tp)
    if shared % parallel.ep:
        yield (
            "parallel.ep",
            f"{parallel.ep} does not divide the {shared} ranks of a pipeline stage, over which experts are shared",
        )
    if parallel.ep > 1 and recipe.engine.name == "deepspeed":
        yield "parallel.ep", f"{parallel.ep} needs engine megatron; use 1 with deepspeed"
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield (
            "parallel.sequence_parallel",
            f"is needed by model.moe with parallel.tp {parallel.tp}; set it to true",
        )


def _bucket_problems(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    shortest, length, key = (
        recipe.data.buckets.shortest,
        recipe.training.seq_length,
        "data.buckets.shortest",
    )
    times, rest = divmod(length, shortest)
    if rest or times & (times - 1):
        yield (
            key,
            f"{shortest} times a power of two is not training.seq_length {length}; use {_halved(length)}",
        )
        return
    try:
        align = recipe.model.document_alignment
    except (KeyError, ValueError):
        return
    unit = math.lcm(_parts(recipe), align)
    for name, block in recipe.model.layers.blocks.items():
        shard = shortest * recipe.parallel.tp // _parts(recipe)
        if recipe.parallel.cp > 1 and shard % block.rank_block:
            reason = f"{shortest} gives context-parallel ranks parts of {shard} tokens, which are not whole blocks of"
            yield key, f"{reason} model.layers.blocks.{name}; use a greater one"
    if shortest % unit:
        reason = f"{shortest} is not a multiple of {unit}, by which context and tensor parallel ranks and patterns divide sequences"
        yield key, f"{reason}; use a greater one"


def _halved(length: int) -> int:
    """The greatest of its halves, quarters and so on that is at most 256, or the last that is whole."""
    while length > 256 and length % 2 == 0:
        length //= 2
    return length


def _stage_problems(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    """What is wrong with the recipe of a stage, but not with the one before it."""
    before, known = 0, set(_of_stage(recipe))
    for number, stage in enumerate(recipe.stages):
        key = f"stages.{number}"
        if not before < stage.from_step < recipe.training.steps:
            reason = f"{stage.from_step} is not between {before} and training.steps {recipe.training.steps}"
            yield f"{key}.from_step", f"{reason}; stages stand in their order"
        before = stage.from_step
        if stage.data is not None and (stage.data.mqar, stage.data.tokenizer) != (
            recipe.data.mqar,
            recipe.data.tokenizer,
        ):
            yield (
                f"{key}.data",
                "must have the tokenizer and the mqar of the recipe's data, whose section it replaces",
            )
            continue
        if stage.data is not None and recipe.evaluation.ngram_baseline:
            yield (
                "evaluation.ngram_baseline",
                f"counts the data of the whole run, and {key} has others; set it to false",
            )
        for problem, reason in _of_stage(recipe.at(stage.from_step)):
            if (problem, reason) not in known:
                yield f"{key}.{problem}", reason


def _of_stage(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    yield from _data_problems(recipe)
    yield from _training_problems(recipe)
