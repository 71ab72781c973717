"""Run one rank of a comparison: the gradients of step 1, then all steps of a recipe.

Arguments: RECIPE OUT [section.key=value ...]. Rank 0 writes the results to OUT.
"""

import sys

import torch
import torch.distributed as dist
from longspan.launch.process import process_group
from longspan.trainer.recipe.file import load_recipe


def edges(sequences) -> dict[str, int]:
    """Count the documents that start on an edge between two segments, and inside one."""
    counts = {"on": 0, "inside": 0}
    for sequence in sequences:
        segment_starts = {segment.start for segment in sequence.layout.segments_in_order}
        for ids in sequence.all_documents:
            lengths = ids.unique_consecutive(return_counts=True)[1]
            for start in lengths.cumsum(0)[:-1].tolist():
                counts["on" if start in segment_starts else "inside"] += 1
    return counts


def main(recipe_file: str, out: str, *overrides: str) -> None:
    recipe = load_recipe(recipe_file, list(overrides))
    with process_group(1):
        from longspan.trainer.data.batches import Batches
        from longspan.trainer.data.prepare import prepare_data
        from longspan.trainer.data.tokenizer import recipe_vocab_size
        from longspan.trainer.engines.build import build_engine

        engine = build_engine(recipe)
        batches = Batches(
            recipe,
            prepare_data(recipe),
            recipe_vocab_size(recipe),
            engine.batch_shard,
            engine.device,
        )
        results = {
            "weights": engine.weights(),
            "gradients": engine.gradients(list(batches.step(0))),
        }
        tokens = [
            sum(int(batch.weights.sum()) for batch in batches.step(s))
            for s in range(recipe.training.steps)
        ]
        results["steps"] = [
            engine.step(list(batches.step(s)), recipe.optimizer.lr)
            for s in range(recipe.training.steps)
        ]
        results["evaluations"] = [engine.evaluate(batch) for batch in batches.step(0)]
        results["edges"] = edges(
            batch.sequence for s in range(recipe.training.steps) for batch in batches.step(s)
        )
        results["local_tokens"] = [None] * dist.get_world_size()
        dist.all_gather_object(results["local_tokens"], tokens)
        if dist.get_rank() == 0:
            torch.save(results, out)
        engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
