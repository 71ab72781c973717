"""``longspan data build``: tokenize text to a corpus."""

import argparse
import os
from pathlib import Path

from ..options import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tokenize text files, .jsonl and .parquet files, and folders of them, to the .bin/.idx "
        "format of Megatron."
    )
    parser.add_argument("sources", type=user_path, nargs="+", metavar="SOURCE")
    parser.add_argument(
        "--key",
        default="text",
        help="key of the text in a .jsonl line, or its .parquet column (default text)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: all cores)",
    )
    parser.add_argument(
        "--tokenizer",
        type=user_path,
        default="bytes",
        help="bytes (default), or the path of a tokenizer.json",
    )
    parser.add_argument(
        "--out",
        type=user_path,
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.bin, PREFIX.idx and PREFIX.json",
    )


def run(options: argparse.Namespace) -> None:
    from ...trainer.data.build import build_corpus
    from ...trainer.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer, "--tokenizer")
    sources = [Path(source) for source in options.sources]
    workers = max(1, options.workers)
    corpus = build_corpus(sources, tokenizer, options.out, workers=workers, key=options.key)
    print(
        f"{options.out}: {corpus.documents:,} documents, {corpus.tokens:,} tokens, "
        f"{corpus.bytes:,} bytes of text"
    )
