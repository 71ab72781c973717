"""Text files, folders and JSONL to a tokenized corpus."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import UserError
from ..progress import track
from .corpus import Record, files, write_record
from .tokenizer import Tokenizer


def build_corpus(sources: list[Path], tokenizer: Tokenizer, prefix: str, description: str = "Tokenizing") -> Record:
    """Tokenize every document of ``sources`` to ``prefix`` and return the record.

    A text file is a document; a folder is all its text files, by name (what is not UTF-8 is left out, and counted); each
    line of a ``.jsonl`` is an object whose ``text`` is a document. Written beside the target and renamed, the index last:
    a corpus is whole or not there.

    Raises:
        UserError: the target exists, a source does not, a named file is not UTF-8, a .jsonl is not JSONL.
    """
    for target in files(prefix):
        if target.exists():
            raise UserError(f"{target}: exists already; remove it or choose another --out")
    texts = {path: source == path for source in sources for path in _files(source)}
    if not texts:
        raise UserError(f"no text found in {', '.join(map(str, sources))}")

    import numpy as np
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    building = f"{prefix}.building-{os.getpid()}"
    data, index, record_file = files(building)
    documents = tokens = size = 0
    try:
        builder = IndexedDatasetBuilder(str(data), dtype=DType.optimal_dtype(tokenizer.vocab_size))
        for text in _documents(texts, description):
            ids = [*tokenizer.encode(text), tokenizer.end_of_document]
            builder.add_document(np.array(ids), [len(ids)])
            documents, tokens, size = documents + 1, tokens + len(ids), size + len(text)
        builder.finalize(str(index))
        if not documents:
            raise UserError(f"no document found in {', '.join(map(str, sources))}")
        record = Record(tokenizer.identity, tokenizer.vocab_size, tokenizer.end_of_document, documents, tokens, size)
        write_record(building, record)
        for built, target in zip((data, record_file, index), (files(prefix)[i] for i in (0, 2, 1)), strict=True):
            built.rename(target)
    finally:
        for path in (data, index, record_file):
            path.unlink(missing_ok=True)
    return record


def _files(source: Path) -> list[Path]:
    """The file itself, or all in a folder by name, but for what is hidden or a cache of Python's."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder")
    inside = (path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file())
    kept = (path for path in inside if not any(part.startswith(".") or part == "__pycache__" for part in path.parts))
    return [source / path for path in kept]


def _documents(texts: dict[Path, bool], description: str) -> Iterator[bytes]:
    """The text of each document; ``texts`` says of each file whether it was named itself rather than found in a folder."""
    left_out = []
    with track(description, total=sum(path.stat().st_size for path in texts)) as advance:
        for path, named in texts.items():
            if path.suffix == ".jsonl":
                yield from _lines(path, advance)
                continue
            text = path.read_bytes()
            try:
                text.decode("utf-8")
            except UnicodeDecodeError as error:
                if named:
                    raise UserError(f"{path}: not UTF-8 text (byte {error.start}); leave it out or convert it") from None
                left_out.append(path)
            else:
                yield text
            advance(len(text))
    if left_out:
        print(f"longspan: left out {len(left_out)} files that are not UTF-8 text, such as {left_out[0]}", file=sys.stderr)


def _lines(path: Path, advance: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield json.loads(line)["text"].encode()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}:{number}: not a JSON object with a string under the key text") from None
            advance(len(line))
