"""The files of a tokenized corpus on disk.

Megatron's ``PREFIX.bin`` (token ids) and ``PREFIX.idx`` (lengths of sequences, and which of them
make up a document), and our ``PREFIX.json``, a record of how they were made. A corpus that Megatron
made has no record and works as well: its ids are then checked as they are read.
"""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

_HASHED_BLOCKS = 64
_HASHED_BLOCK_BYTES = 4096


class CorpusFiles(NamedTuple):
    """The paths of a corpus, by their suffixes."""

    bin: Path
    """Token ids."""
    idx: Path
    """Lengths of sequences, and where documents begin."""
    json: Path
    """Our record."""


def corpus_files(prefix: str) -> CorpusFiles:
    """Return the paths of the corpus with this prefix, whether or not they exist."""
    return CorpusFiles(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json"))


@dataclass(frozen=True)
class CorpusRecord:
    """What was built, and with which tokenizer. The fields are the keys of ``PREFIX.json``."""

    tokenizer: str
    """The tokenizer's ``identity``."""
    vocab_size: int
    end_of_document: int
    """Token id."""
    documents: int
    tokens: int
    """With the end of each document."""
    bytes: int
    """Of text."""
    reads_special_tokens: bool = False
    """Whether the spelling of a special token in the text was read as that token."""


def write_record(prefix: str, record: CorpusRecord) -> None:
    """Write ``PREFIX.json``."""
    corpus_files(prefix).json.write_text(json.dumps(asdict(record), indent=1) + "\n")


def read_record(prefix: str) -> CorpusRecord | None:
    """Read ``PREFIX.json``. Returns None if there is none.

    Raises:
        UserError: if it is damaged.
    """
    path = corpus_files(prefix).json
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); build the corpus again") from None
    problem = _record_problem(content)
    if problem:
        raise UserError(
            f"{path}: not the record of a corpus: {problem}; build the corpus again, or remove the "
            "file if it is not of this corpus"
        )
    names = [field.name for field in fields(CorpusRecord)]
    return CorpusRecord(**{name: content[name] for name in names if name in content})


def _record_problem(content: object) -> str | None:
    """Return what is wrong with the content of a record. Keys of later versions may be there."""
    if not isinstance(content, dict):
        return "it is no object"
    for entry in fields(CorpusRecord):
        if entry.name not in content:
            if entry.default is MISSING:
                return f"it has no {entry.name}"
        elif type(content[entry.name]) is not entry.type:
            return f"its {entry.name} is {content[entry.name]!r}"
    return None


def fingerprint(prefix: str) -> str:
    """Return a string that tells one corpus from another.

    It is the SHA-256 of the index and of 64 blocks of the data, which may be too large to read
    whole.
    """
    files = corpus_files(prefix)
    with files.idx.open("rb") as index:
        digest = hashlib.file_digest(index, "sha256")
    num_bytes = files.bin.stat().st_size
    with files.bin.open("rb") as data:
        for block in range(_HASHED_BLOCKS):
            data.seek(num_bytes * block // _HASHED_BLOCKS)
            digest.update(data.read(_HASHED_BLOCK_BYTES))
    return f"{digest.hexdigest()}-{num_bytes}"
