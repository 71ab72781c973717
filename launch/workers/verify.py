"""A rank of ``longspan verify``: writes to a file what the recipe's layers do.

Runs under :func:`longspan.launch.ranks.run_ranks`. Over one rank it computes the same cases without
context parallelism.
"""

import argparse
import os
import sys
from pathlib import Path

from ...trainer.recipe.file import load_recipe
from ...trainer.recipe.schema import Recipe
from ..process import exit_status, process_group, quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--cp", type=int, required=True, help="ranks that are verified")
    parser.add_argument("--out", type=Path, required=True, help="file that the first rank writes")
    options = parser.parse_args()
    observe(load_recipe(options.recipe, options.overrides), options.cp, options.out)


def observe(recipe: Recipe, cp: int, out: Path) -> None:
    """As one of ``cp`` ranks, or as the only one, write what each case does to ``out``."""
    # Exactness is shown in fp32 on the CPU: GPUs do not add up in one order.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    import torch.distributed as dist

    from ...trainer.evaluation.parity import cases, documents_of, measure_ranks, probes_of, shrink

    shrunk = shrink(recipe, cp)
    with process_group(1):
        seen = {}
        documents = documents_of(shrunk)
        probes = probes_of(shrunk, documents)
        for name, case in cases(shrunk):
            if dist.get_world_size() == 1:
                case = case.model_copy(
                    update={"parallel": case.parallel.model_copy(update={"cp": 1})}
                )
            seen[name] = measure_ranks(case, documents, probes)
        if dist.get_rank() == 0:
            torch.save(seen, out)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(exit_status(main))
