"""Run one rank of two training steps on a CPU, with a choice that is made on CUDA.

Arguments: RECIPE CHOICE [section.key=value ...]. Rank 0 prints the steps as JSON: loss, gradient
norm, balance loss; and how often which backend was chosen.

Choices: ``alltoall``, Megatron's dispatcher of experts' tokens; ``triton``, our kernels, in
Triton's interpreter (``TRITON_INTERPRET=1``); ``cpu``, those of a CPU.
"""

import json
import sys
from collections import Counter

import torch
import torch.distributed as dist
from longspan.attention.linear import attention as linear
from longspan.attention.softmax import attend as softmax
from longspan.launch.process import process_group
from longspan.parallel import softmax as softmax_over_ranks
from longspan.trainer.recipe.file import load_recipe

chosen: Counter[str] = Counter()


def dispatch_by_all_to_all() -> None:
    """Let experts' tokens move as on CUDA; Megatron passes sizes as tensors, gloo needs numbers."""
    from longspan.trainer.model import cpu, model

    config_of_cpu = model.moe_config

    def moe_config(sizes):
        return config_of_cpu(sizes) | {"moe_token_dispatcher_type": "alltoall"}

    exchange = dist.all_to_all_single

    def all_to_all_single(output, given, output_sizes=None, input_sizes=None, **options):
        chosen["all_to_all_single"] += 1
        sizes = [
            None if each is None else list(map(int, each)) for each in (output_sizes, input_sizes)
        ]
        return exchange(output, given, *sizes, **options)

    def exchange_with_names(output, given, output_split_sizes=None, input_split_sizes=None, **rest):
        return all_to_all_single(output, given, output_split_sizes, input_split_sizes, **rest)

    model.moe_config = moe_config
    dist.all_to_all_single = torch.distributed.all_to_all_single = exchange_with_names
    cpu._NoStream.record_event = lambda stream: cpu._NoStream()
    torch.Tensor.record_stream = lambda tensor, stream: None


def compute_by_triton() -> None:
    """Choose backends as on a GPU, of which only our kernels and torch are here."""

    def choose_softmax(backend, q, k, v, pattern, logits, *_):
        name = softmax.fastest_backend(q, k, v, pattern, logits).backend
        chosen[f"softmax {type(pattern).__name__} {name}"] += 1
        return name

    def choose_linear(backend, q, k, v, decay, beta):
        name = linear.fastest_backend(q, k, v, decay, beta).backend
        chosen[f"linear {name}"] += 1
        return linear.BACKENDS[name]()

    softmax.choose_backend = softmax_over_ranks.choose_backend = choose_softmax
    linear._choose_backend = choose_linear


def main(recipe_file: str, choice: str, *overrides: str) -> None:
    if choice == "alltoall":
        dispatch_by_all_to_all()
    elif choice == "triton":
        compute_by_triton()
    recipe = load_recipe(recipe_file, list(overrides))
    with process_group(1):
        from longspan.trainer.data.batches import Batches
        from longspan.trainer.data.prepare import prepare_data
        from longspan.trainer.data.tokenizer import recipe_vocab_size
        from longspan.trainer.engines.build import build_engine

        engine = build_engine(recipe)
        data = prepare_data(recipe)
        vocab_size = recipe_vocab_size(recipe)
        batches = Batches(recipe, data, vocab_size, engine.batch_shard, engine.device)
        steps = [engine.step(list(batches.step(step)), 1e-3) for step in range(2)]
        num_documents = sum(
            len(ids.unique()) for batch in batches.step(0) for ids in batch.sequence.documents
        )
        if dist.get_rank() == 0:
            found = {
                "steps": [[step.loss, step.grad_norm, step.balance_loss or 0.0] for step in steps],
                "chosen": dict(chosen),
                "documents": num_documents,
            }
            print(json.dumps(found))
        engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
