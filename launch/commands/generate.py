"""``longspan generate``: sample text from a trained run."""

import argparse
import os

from ..options import user_path
from ..process import process_group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=user_path, metavar="RUN")
    parser.add_argument("--prompt", default="import ")
    parser.add_argument(
        "--tokens", type=int, default=256, help="most tokens to generate (default 256)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 for the most likely token (default 0.8)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--parse-special",
        action="store_true",
        help="read special tokens that are spelled in the prompt as these tokens, not as text",
    )


def run(options: argparse.Namespace) -> None:
    from ...trainer.checkpoint.run_folder import RunFolder
    from ...trainer.data.tokenizer import recipe_tokenizer

    folder = RunFolder(options.run_dir)
    # A wrong folder, or a run that was not trained on text, is reported before torch is imported.
    recipe_tokenizer(folder.recipe)

    from ...trainer.engines.inference import generate, load_for_inference

    with process_group(os.cpu_count() or 1):
        engine = load_for_inference(folder)
        text = generate(
            folder,
            engine,
            options.prompt,
            options.tokens,
            options.temperature,
            options.seed,
            options.parse_special,
        )
        print(text)
