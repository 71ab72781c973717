"""What is wrong with a recipe although each of its keys is legal. Without torch."""

import math
from collections.abc import Iterator

from ..errors import suggest
from .kv_schedules import schedule_problems
from .problem import Problem, Problems
from .schema import ModelConfig, MoEConfig, MQARConfig, Recipe


def combination_problems(recipe: Recipe) -> Problems:
    """Yield every combination of keys that is impossible."""
    yield from _model_problems(recipe.model)
    yield from _data_problems(recipe)
    yield from _training_problems(recipe)
    yield from _memory_problems(recipe)
    yield from recipe.engine.problems(recipe.parallel.pp, recipe.training.dtype)
    yield from _expert_problems(recipe)
    yield from _stage_problems(recipe)


def _model_problems(model: ModelConfig) -> Problems:
    blocks, pattern = model.layers.blocks, model.layers.pattern
    for name in dict.fromkeys(pattern):
        if name not in blocks:
            reason = f"names an unknown block {name!r}; the blocks are {', '.join(blocks)}"
            yield Problem("model.layers.pattern", reason)
    for name, block in blocks.items():
        key = f"model.layers.blocks.{name}"
        if name not in pattern:
            yield Problem(key, "is not in model.layers.pattern; name it there or remove it")
        for problem in block.problems(model):
            yield Problem(f"{key}.{problem.field}", problem.reason)

    if model.hidden_size == 1:
        yield Problem("model.hidden_size", "1 leaves only its sign after a norm; use 2 or more")
    heads, kv_heads = model.num_attention_heads, model.kv_heads
    if model.head_dim is None and model.hidden_size % heads:
        reason = f"{heads} does not divide hidden_size {model.hidden_size}; set head_dim"
        yield Problem("model.num_attention_heads", reason)
    if heads % kv_heads:
        reason = f"{kv_heads} does not divide num_attention_heads {heads}"
        yield Problem("model.num_key_value_heads", reason)


def _data_problems(recipe: Recipe) -> Problems:
    if recipe.data.mqar is not None:
        yield from _recall_problems(recipe, recipe.data.mqar)
        return
    if recipe.data.sources is None:
        yield Problem("data.sources", "is required, or data.mqar in its place")
    if recipe.data.packing == "buckets":
        yield from _bucket_problems(recipe)


def _recall_problems(recipe: Recipe, task: MQARConfig) -> Problems:
    data = recipe.data
    length = recipe.training.seq_length
    if data.packing != "concat":
        reason = "has no effect on data.mqar, whose examples are not documents; remove it"
        yield Problem("data.packing", reason)
    if data.sources is not None:
        reason = "is set together with data.sources; set one of the two to null"
        yield Problem("data.mqar", reason)

    most_pairs = max(task.pairs)
    if most_pairs > task.keys:
        reason = (
            f"{task.vocab_size} has {task.keys} keys for {most_pairs} pairs; "
            f"use at least {2 * most_pairs + 2}"
        )
        yield Problem("data.mqar.vocab_size", reason)
    if 4 * most_pairs > length:
        reason = (
            f"{most_pairs} pairs and their questions take {4 * most_pairs} tokens, "
            f"training.seq_length is {length}; use at most {length // 4} pairs, or longer sequences"
        )
        yield Problem("data.mqar.pairs", reason)
    if length % 2:
        reason = f"{length} is odd, but data.mqar fills places of two tokens; use {length + 1}"
        yield Problem("training.seq_length", reason)
    if recipe.model.vocab_size not in (None, task.vocab_size):
        reason = f"{recipe.model.vocab_size} is not that of data.mqar, {task.vocab_size}; remove it"
        yield Problem("model.vocab_size", reason)

    if data.tokenizer != "bytes":
        reason = "has no effect on data.mqar, whose tokens are not text; remove it"
        yield Problem("data.tokenizer", reason)
    if data.validation is not None:
        reason = "has no effect on data.mqar, which makes its own held-out data; remove it"
        yield Problem("data.validation", reason)
    if recipe.evaluation.sample_prompt is not None:
        reason = "needs text to continue, and data.mqar has none; remove it"
        yield Problem("evaluation.sample_prompt", reason)


def _equal_parts(recipe: Recipe) -> int:
    """Return the number of equal parts that a sequence must have.

    A zigzag rank has two of them; Megatron splits each rank's tokens over tp, and its pipeline
    needs equal shapes.
    """
    parallel = recipe.parallel
    per_rank = 2 if parallel.layout == "zigzag" and parallel.cp > 1 else 1
    return parallel.cp * parallel.tp * per_rank


def _document_alignment(model: ModelConfig) -> int | None:
    """Return the model's alignment, or None if its blocks or patterns are faulty, which
    :func:`_model_problems` reports.
    """
    try:
        return model.document_alignment
    except (KeyError, ValueError):
        return None


def _training_problems(recipe: Recipe) -> Problems:
    yield from _split_problems(recipe)
    yield from _length_problems(recipe)
    yield from schedule_problems(recipe.model, recipe.parallel)
    for name, part, unit in _split_blocks(recipe, recipe.training.seq_length):
        reason = (
            f"{recipe.training.seq_length} gives context-parallel ranks parts of {part} tokens, "
            f"which are not whole blocks of model.layers.blocks.{name}: use a multiple of {unit}"
        )
        yield Problem("training.seq_length", reason)
    if recipe.checkpoint.keep_latest_k == 1:
        reason = (
            "1 would leave no checkpoint to fall back on if it is damaged; "
            "use 2 or more, or 0 for all"
        )
        yield Problem("checkpoint.keep_latest_k", reason)
    yield from _batch_problems(recipe)


def _split_problems(recipe: Recipe) -> Problems:
    """What tensor and pipeline parallelism cannot split."""
    model, parallel = recipe.model, recipe.parallel
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.intermediate_size,
    }
    for name, block in model.layers.blocks.items():
        for key, size in block.tensor_parallel_splits(model).items():
            sizes[f"layers.blocks.{name}.{key}"] = size
    for key, size in sizes.items():
        if size % parallel.tp:
            yield Problem("parallel.tp", f"{parallel.tp} does not divide model.{key} {size}")
    if 128 % parallel.tp:
        reason = f"{parallel.tp} does not divide 128, to whose multiple the vocabulary is padded"
        yield Problem("parallel.tp", reason)
    if parallel.sequence_parallel and parallel.tp == 1:
        reason = "splits tokens over tensor-parallel ranks, but parallel.tp is 1; remove it"
        yield Problem("parallel.sequence_parallel", reason)
    if model.num_hidden_layers % parallel.pp:
        reason = f"{parallel.pp} does not divide model.num_hidden_layers {model.num_hidden_layers}"
        yield Problem("parallel.pp", reason)


def _length_problems(recipe: Recipe) -> Problems:
    parallel = recipe.parallel
    length = recipe.training.seq_length
    alignment = _document_alignment(recipe.model) or 1
    if length % alignment:
        reason = f"{length} is not a multiple of the patterns' largest block, {alignment}"
        yield Problem("training.seq_length", reason)

    data = recipe.data
    evaluation = recipe.evaluation
    counts_bytes = not (data.mqar or data.tokenizer != "bytes" or recipe.model.vocab_size)
    if evaluation.ngram_baseline and not counts_bytes:
        needs = "data.sources of data.tokenizer bytes, and no model.vocab_size"
        reason = f"counts bytes: needs {needs}; set it to false"
        yield Problem("evaluation.ngram_baseline", reason)

    parts = _equal_parts(recipe)
    if length % parts:
        fitting = length + -length % math.lcm(parts, alignment)
        reason = (
            f"{length} does not split into {parts} equal parts for parallel.cp {parallel.cp} "
            f"({parallel.layout}) and tp {parallel.tp}; use {fitting}"
        )
        yield Problem("training.seq_length", reason)


def _split_blocks(recipe: Recipe, length: int) -> Iterator[tuple[str, int, int]]:
    """Yield the blocks whose tokens must be whole on a rank and are not, in sequences of ``length``
    tokens: name, tokens of a part, and the number of which ``length`` must be a multiple.
    """
    parallel = recipe.parallel
    parts = _equal_parts(recipe)
    if parallel.cp == 1:
        return
    part = length * parallel.tp // parts
    for name, block in recipe.model.layers.blocks.items():
        if part % block.rank_block:
            yield name, part, parts // parallel.tp * block.rank_block


def _batch_problems(recipe: Recipe) -> Problems:
    processes = recipe.launch.processes
    model_ranks = recipe.parallel.model_ranks
    if processes % model_ranks:
        reason = (
            f"{processes} is not a multiple of parallel.tp * cp * pp = {model_ranks}; "
            f"use {model_ranks}"
        )
        yield Problem("launch.processes", reason)
        return
    training = recipe.training
    sequences = recipe.data_parallel * training.micro_batch_size
    if training.global_batch_size % sequences:
        reason = (
            f"{training.global_batch_size} is not a multiple of training.micro_batch_size "
            f"{training.micro_batch_size} x {recipe.data_parallel} data-parallel ranks "
            f"= {sequences}"
        )
        yield Problem("training.global_batch_size", reason)


def _memory_problems(recipe: Recipe) -> Problems:
    memory = recipe.memory
    blocks = recipe.model.layers.blocks
    for name in memory.recompute_blocks:
        if name not in blocks:
            suggestion = suggest(name, list(blocks))
            reason = f"is not a block{suggestion}; known: {', '.join(blocks)}"
            yield Problem(f"memory.recompute_blocks.{name}", reason)
    not_full = [name for name in blocks if memory.recompute_of(name) != "full"]
    if memory.offload_inputs and not_full:
        name = not_full[0]
        reason = (
            f"block {name} keeps more than its input (recompute {memory.recompute_of(name)}); "
            "set memory.recompute to full"
        )
        yield Problem("memory.offload_inputs", reason)


def _expert_problems(recipe: Recipe) -> Problems:
    moe = recipe.model.moe
    ep = recipe.parallel.ep
    blocks = recipe.model.layers.blocks
    with_experts = [name for name, block in blocks.items() if block.mlp == "moe"]
    if moe is None:
        if with_experts:
            reason = "is moe, but model.moe, which says how many experts, is missing"
            yield Problem(f"model.layers.blocks.{with_experts[0]}.mlp", reason)
        if ep > 1:
            reason = f"{ep} has no experts to share; set model.moe, or 1"
            yield Problem("parallel.ep", reason)
        return
    yield from _moe_problems(moe, used=bool(with_experts))
    for name in with_experts:
        if blocks[name].mlp_activation != "silu":
            key = f"model.layers.blocks.{name}.mlp_activation"
            yield Problem(key, "must be silu for experts; remove it")
    if recipe.memory.mlp_tile and with_experts:
        reason = (
            f"{recipe.memory.mlp_tile} would balance the experts of {with_experts[0]} tile by tile;"
            " remove it and use memory.recompute"
        )
        yield Problem("memory.mlp_tile", reason)
    yield from _expert_split_problems(recipe, moe)


def _moe_problems(moe: MoEConfig, used: bool) -> Problems:
    if not used:
        yield Problem("model.moe", "is used by no block; set mlp: moe in one, or remove it")
    if moe.num_experts_per_tok > moe.num_experts:
        reason = f"{moe.num_experts_per_tok} is more than the {moe.num_experts} experts"
        yield Problem("model.moe.num_experts_per_tok", reason)
    if moe.num_experts_per_tok == 1 and moe.norm_topk_prob:
        reason = (
            "1 with norm_topk_prob makes the weight of a token's one expert always 1, from which "
            "the router learns nothing; set model.moe.norm_topk_prob to false, or use 2 or more"
        )
        yield Problem("model.moe.num_experts_per_tok", reason)
    if moe.shared_expert_gate and moe.shared_expert_intermediate_size is None:
        reason = "has no expert to gate; set model.moe.shared_expert_intermediate_size"
        yield Problem("model.moe.shared_expert_gate", reason)


def _expert_split_problems(recipe: Recipe, moe: MoEConfig) -> Problems:
    """What tensor and expert parallelism cannot split."""
    parallel = recipe.parallel
    # With expert parallelism, the matrices of a routed expert are whole on its rank.
    split_sizes = {"shared_expert_intermediate_size": moe.shared_expert_intermediate_size}
    if parallel.ep == 1:
        split_sizes = {"intermediate_size": moe.intermediate_size, **split_sizes}
    for key, size in split_sizes.items():
        if (size or 0) % parallel.tp:
            yield Problem("parallel.tp", f"{parallel.tp} does not divide model.moe.{key} {size}")
    if moe.num_experts % parallel.ep:
        reason = f"{parallel.ep} does not divide model.moe.num_experts {moe.num_experts}"
        yield Problem("parallel.ep", reason)
    ranks_per_expert = 1 if parallel.ep > 1 else parallel.tp
    sharing_ranks = recipe.launch.processes // parallel.pp // ranks_per_expert
    if sharing_ranks % parallel.ep:
        reason = (
            f"{parallel.ep} does not divide the {sharing_ranks} ranks of a pipeline stage, "
            "over which experts are shared"
        )
        yield Problem("parallel.ep", reason)
    if parallel.ep > 1 and not recipe.engine.has_expert_parallel:
        reason = f"{parallel.ep} needs engine megatron; use 1 with {recipe.engine.name}"
        yield Problem("parallel.ep", reason)
    if parallel.tp > 1 and not parallel.sequence_parallel:
        reason = f"is needed by model.moe with parallel.tp {parallel.tp}; set it to true"
        yield Problem("parallel.sequence_parallel", reason)


def _bucket_problems(recipe: Recipe) -> Problems:
    key = "data.buckets.shortest"
    shortest = recipe.data.buckets.shortest
    length = recipe.training.seq_length
    times, rest = divmod(length, shortest)
    is_power_of_two = times & (times - 1) == 0
    if rest or not is_power_of_two:
        reason = (
            f"{shortest} times a power of two is not training.seq_length {length}; "
            f"use {_halved(length)}"
        )
        yield Problem(key, reason)
        return
    alignment = _document_alignment(recipe.model)
    if alignment is None:
        return
    for name, part, _ in _split_blocks(recipe, shortest):
        reason = (
            f"{shortest} gives context-parallel ranks parts of {part} tokens, which are not whole "
            f"blocks of model.layers.blocks.{name}; use a larger one"
        )
        yield Problem(key, reason)
    unit = math.lcm(_equal_parts(recipe), alignment)
    if shortest % unit:
        reason = (
            f"{shortest} is not a multiple of {unit}, by which context and tensor parallel ranks "
            "and patterns divide sequences; use a larger one"
        )
        yield Problem(key, reason)


def _halved(length: int) -> int:
    """Return the largest of its halves, quarters and so on that is at most 256, or the last that is
    a whole number.
    """
    while length > 256 and length % 2 == 0:
        length //= 2
    return length


def _stage_problems(recipe: Recipe) -> Problems:
    """Yield what is wrong with the recipe of a stage, but not with the recipe itself."""
    previous_start = 0
    known = set(_problems_of_stage(recipe))
    for number, stage in enumerate(recipe.stages):
        key = f"stages.{number}"
        if not previous_start < stage.from_step < recipe.training.steps:
            reason = (
                f"{stage.from_step} is not between {previous_start} and training.steps "
                f"{recipe.training.steps}; stages must be in order"
            )
            yield Problem(f"{key}.from_step", reason)
        previous_start = stage.from_step
        if stage.data is not None:
            same_tokens = (
                stage.data.mqar == recipe.data.mqar
                and stage.data.tokenizer == recipe.data.tokenizer
            )
            if not same_tokens:
                reason = (
                    "must have the tokenizer and the mqar of the recipe's data, "
                    "whose section it replaces"
                )
                yield Problem(f"{key}.data", reason)
                continue
            if recipe.evaluation.ngram_baseline:
                reason = f"counts the data of the whole run, and {key} has others; set it to false"
                yield Problem("evaluation.ngram_baseline", reason)
        for problem in _problems_of_stage(recipe.at_step(stage.from_step)):
            if problem not in known:
                yield Problem(f"{key}.{problem.key}", problem.reason)


def _problems_of_stage(recipe: Recipe) -> Problems:
    yield from _data_problems(recipe)
    yield from _training_problems(recipe)
