"""Text to token ids and back."""

import hashlib
from pathlib import Path
from typing import Protocol

from ..errors import UserError
from ..recipe.schema import Recipe

_END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]")
"""Tokens that end a document, in the order in which they are looked for."""


class Tokenizer(Protocol):
    """What turns text into token ids, with one id that ends every document."""

    identity: str
    """Equal for two tokenizers that give the same ids."""
    vocab_size: int
    end_of_document: int
    """Token id."""

    def encode(self, text: bytes) -> list[int]:
        """Return the ids of UTF-8 text, without an end of document."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        ...


class ByteTokenizer:
    """Each byte is its own id, and 256 ends a document."""

    identity = "bytes"
    vocab_size = 257
    end_of_document = 256

    def encode(self, text: bytes) -> list[int]:
        return list(text)

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class HubTokenizer:
    """A Hugging Face ``tokenizer.json``; a document ends with the end-of-text token it defines.

    Raises:
        UserError: if the file is no tokenizer, or has none of the known end-of-text tokens.
    """

    def __init__(self, path: Path):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

        ends = [self._tokenizer.token_to_id(token) for token in _END_OF_DOCUMENT]
        known_ends = [token for token in ends if token is not None]
        if not known_ends:
            raise UserError(
                f"{path}: has no end-of-document token; add one of {', '.join(_END_OF_DOCUMENT)}"
            )
        self.end_of_document = known_ends[0]
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.identity = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"

    def encode(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8"), add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def load_tokenizer(name: str, key: str) -> Tokenizer:
    """Load a tokenizer by its ``name``: ``bytes``, or the path of a ``tokenizer.json``.

    Args:
        name: as the user gave it.
        key: the option or recipe key, for errors.

    Raises:
        UserError: if there is no such tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{key}: {name} is neither the word bytes nor the path of a tokenizer.json")
    return HubTokenizer(path)


def recipe_tokenizer(recipe: Recipe) -> Tokenizer:
    """Return the tokenizer that ``data.tokenizer`` names.

    Raises:
        UserError: if the recipe trains on a task, whose tokens are not text.
    """
    if recipe.data.mqar:
        raise UserError(
            "data.mqar: its tokens are not text; "
            "use `longspan eval mqar RUN` to see what the model has learned"
        )
    return load_tokenizer(recipe.data.tokenizer, "data.tokenizer")


def recipe_vocab_size(recipe: Recipe) -> int:
    """Return the number of ids that the recipe's model knows, before padding."""
    if recipe.data.mqar:
        return recipe.data.mqar.vocab_size
    return recipe.model.vocab_size or recipe_tokenizer(recipe).vocab_size
