"""Text files, folders and JSONL to a tokenized corpus."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError
from ..progress import track
from .corpus import Record, files, write_record
from .tokenizer import Tokenizer


def build_corpus(sources: list[Path], tokenizer: Tokenizer, prefix: str, description: str = "Tokenizing") -> Record:
    """Tokenize every document of ``sources`` to ``prefix`` and return the record.

    A text file is a document; a folder is all its files, by name; each line of a ``.jsonl`` is an object whose ``text``
    is a document. Written beside the target and renamed, the index last: a corpus is whole or not there.

    Raises:
        UserError: the target exists, a source does not, or is not UTF-8 or not JSONL.
    """
    for target in files(prefix):
        if target.exists():
            raise UserError(f"{target}: exists already; remove it or choose another --out")
    texts = [path for source in sources for path in _text_files(source)]
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


def _text_files(source: Path) -> Iterator[Path]:
    if source.is_dir():
        inside = (path.relative_to(source) for path in sorted(source.rglob("*")))
        yield from (source / path for path in inside if (source / path).is_file() and not str(path.name).startswith("."))
    elif source.is_file():
        yield source
    else:
        raise UserError(f"{source}: no such file or folder")


def _documents(paths: Iterable[Path], description: str) -> Iterator[bytes]:
    paths = list(paths)
    with track(description, total=sum(path.stat().st_size for path in paths), unit="B") as advance:
        for path in paths:
            if path.suffix == ".jsonl":
                yield from _lines(path, advance)
            else:
                text = path.read_bytes()
                _require_utf8(text, f"{path}")
                yield text
                advance(len(text))


def _lines(path: Path, advance) -> Iterator[bytes]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield json.loads(line)["text"].encode()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}:{number}: not a JSON object with a string under the key text") from None
            advance(len(line))


def _require_utf8(text: bytes, where: str) -> None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}); leave it out or convert it") from None
