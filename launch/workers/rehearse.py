"""The process of ``longspan rehearse``, in which torch believes in a GPU."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from ..process import exit_status, quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--documents", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()

    from ..rehearsal.fake_cuda import install_fake_cuda

    install_fake_cuda()

    from ...trainer.predict.estimate import DEVICES
    from ...trainer.recipe.file import load_recipe
    from ..rehearsal.rehearsal import rehearse

    recipe = load_recipe(str(options.recipe))
    found = rehearse(recipe, DEVICES[options.device], options.rank, options.documents)
    options.out.write_text(json.dumps(asdict(found), indent=1))


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(exit_status(main))
