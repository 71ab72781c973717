"""The tokenizer that a run keeps in its folder, so that nothing that happens to the file at the
recipe's path changes what the run's tokens mean.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..data.corpus_files import read_record
from ..data.tokenizer import identity_of
from ..errors import UserError
from ..recipe.schema import Recipe, RunTokenizer
from .atomic import replace_file


@dataclass(frozen=True)
class _Record:
    """The content of ``record.json``."""

    identity: str
    """Of the tokenizer: the SHA-256 of its file."""
    reads_special_tokens: bool
    """Whether a corpus of the run was built with special tokens that its text spells."""


class KeptTokenizer:
    """``tokenizer.json`` and its digest in a run's folder; a run on bytes has none."""

    def __init__(self, folder: Path):
        self._file = folder / "tokenizer.json"
        self._record_file = folder / "record.json"

    def keep(self, recipe: Recipe, reads_special_tokens: bool) -> None:
        """Copy the recipe's tokenizer, unless the run has one already."""
        if not _has_file(recipe) or self._record_file.exists():
            return
        content = Path(recipe.data.tokenizer_file).read_bytes()
        self._file.parent.mkdir(exist_ok=True)
        partial = self._file.with_name(f"{self._file.name}.partial")
        partial.write_bytes(content)
        partial.replace(self._file)
        record = _Record(identity_of(content), reads_special_tokens)
        replace_file(self._record_file, json.dumps(asdict(record), indent=1) + "\n")

    def read_by(self, recipe: Recipe) -> Recipe:
        """Return a recipe of the run that reads this tokenizer.

        A run of before runs kept theirs reads the file at the recipe's path, which must be the one
        that its corpora were built with, if they are there to say so.

        Raises:
            UserError: if the record is damaged.
        """
        if not _has_file(recipe):
            return recipe
        record = self._read_record()
        if record:
            kept = RunTokenizer(str(self._file), record.identity, record.reads_special_tokens)
        else:
            file = str(self._file) if self._file.exists() else recipe.data.tokenizer
            kept = RunTokenizer(file, _identity_by_corpora(recipe), False)
        return recipe.with_run_tokenizer(kept)

    def differs_from(self, recipe: Recipe) -> bool:
        """Tell whether the recipe's path now has another file than the one that is kept."""
        path = Path(recipe.data.tokenizer)
        record = self._read_record() if _has_file(recipe) else None
        return bool(record and path.is_file() and identity_of(path.read_bytes()) != record.identity)

    def exists(self) -> bool:
        """Tell whether a tokenizer is kept."""
        return self._record_file.exists()

    def _read_record(self) -> _Record | None:
        if not self._record_file.exists():
            return None
        try:
            return _Record(**json.loads(self._record_file.read_bytes()))
        except (ValueError, TypeError):
            raise UserError(
                f"{self._record_file}: is damaged; remove it if {self._file.name} beside it is "
                "what the run was trained with"
            ) from None


def _has_file(recipe: Recipe) -> bool:
    return not recipe.data.mqar and recipe.data.tokenizer != "bytes"


def _identity_by_corpora(recipe: Recipe) -> str | None:
    """Return the tokenizer that the recipe's corpora were built with, if one of them says so."""
    for prefix in recipe.data.sources or {}:
        try:
            record = read_record(prefix)
        except UserError:
            continue
        if record:
            return record.tokenizer
    return None
