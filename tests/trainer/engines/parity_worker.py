"""One rank: gradients of step 1, then 20 steps of a recipe; rank 0 writes what it saw. RECIPE OUT [section.key=value ...]"""

import sys

import torch
import torch.distributed as dist
from longspan.launch.process import process_group
from longspan.trainer.recipe.file import load_recipe


def edges(sequences) -> dict[str, int]:
    """How many documents start on the edge between two parts of the layout, and how many inside one."""
    found = {"on": 0, "inside": 0}
    for sequence in sequences:
        parts = {start for start, *_ in sequence.layout.in_order}
        for ids in sequence.all_documents:
            for start in ids.unique_consecutive(return_counts=True)[1].cumsum(0)[:-1].tolist():
                found["on" if start in parts else "inside"] += 1
    return found


def main(recipe_file: str, out: str, *overrides: str) -> None:
    recipe = load_recipe(recipe_file, list(overrides))
    with process_group(1):
        from longspan.trainer.data.batches import Batches
        from longspan.trainer.data.prepare import prepare_data
        from longspan.trainer.data.tokenizer import recipe_vocab_size
        from longspan.trainer.engines.build import build_engine

        engine = build_engine(recipe)
        batches = Batches(
            recipe, prepare_data(recipe), recipe_vocab_size(recipe), engine.share, engine.device
        )
        seen = {"weights": engine.weights(), "gradients": engine.gradients(list(batches.step(0)))}
        tokens = [
            sum(int(batch.weights.sum()) for batch in batches.step(s))
            for s in range(recipe.training.steps)
        ]
        seen["steps"] = [
            engine.step(list(batches.step(s)), recipe.optimizer.lr)
            for s in range(recipe.training.steps)
        ]
        seen["evaluations"] = [engine.evaluate(batch) for batch in batches.step(0)]
        seen["edges"] = edges(
            batch.sequence for s in range(recipe.training.steps) for batch in batches.step(s)
        )
        seen["local_tokens"] = [None] * dist.get_world_size()
        dist.all_gather_object(seen["local_tokens"], tokens)
        if dist.get_rank() == 0:
            torch.save(seen, out)
        engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
