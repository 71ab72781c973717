"""``longspan data build``: tokenize text to a corpus."""

import argparse
import os
from pathlib import Path

from ..options import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Tokenize text, JSON lines, JSON arrays and Parquet, as files or folders of them, also "
        "compressed with gzip or Zstandard, to the .bin/.idx format of Megatron."
    )
    parser.add_argument("sources", type=user_path, nargs="+", metavar="SOURCE")
    parser.add_argument(
        "--key",
        default="text",
        help="key of the text in JSON, or its column in Parquet (default text)",
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
        "--skip-bad",
        action="store_true",
        help="skip documents that cannot be read; count them, and list them in PREFIX.skipped.txt",
    )
    parser.add_argument(
        "--parse-special",
        action="store_true",
        help="read special tokens that are spelled in the text as these tokens, not as text",
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

    tokenizer = load_tokenizer(options.tokenizer, "--tokenizer", options.parse_special)
    sources = [Path(source) for source in options.sources]
    workers = max(1, options.workers)
    corpus = build_corpus(
        sources,
        tokenizer,
        options.out,
        workers=workers,
        key=options.key,
        skip_bad=options.skip_bad,
    )
    print(
        f"{options.out}: {corpus.documents:,} documents, {corpus.tokens:,} tokens, "
        f"{corpus.bytes:,} bytes of text"
    )
