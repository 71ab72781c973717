"""Text to token ids and back."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

from ..errors import UserError
from ..recipe.schema import Recipe
from .cuts import PIECE_CHARACTERS, Cuts, find_cuts

_END_OF_DOCUMENT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's
)
"""Tokens that end a document, in the order in which they are looked for."""


class SpecialTokenError(Exception):
    """The model of a tokenizer itself reads the spelling of a special token as that token."""


class Tokenizer(Protocol):
    """What turns text into token ids, with one id that ends every document."""

    identity: str
    """Equal for two tokenizers that give the same ids."""
    vocab_size: int
    end_of_document: int
    """Token id."""
    reads_special_tokens: bool
    """Whether the spelling of a special token in text is read as that token."""

    def encode(self, text: bytes) -> list[int]:
        """Return the ids of UTF-8 text, without an end of document.

        Raises:
            SpecialTokenError: if special tokens are among them, and are not to be read.
        """
        ...

    def pieces(self, blocks: Iterable[str]) -> Iterator[str]:
        """Cut a text, given in blocks, into parts whose ids are, in their order, the text's."""
        ...

    @property
    def cut_obstacle(self) -> str | None:
        """Why :meth:`pieces` leaves every text whole; None if it does not."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        ...


class ByteTokenizer:
    """Each byte is its own id, and 256 ends a document."""

    identity = "bytes"
    vocab_size = 257
    end_of_document = 256
    reads_special_tokens = False
    cut_obstacle = None

    def encode(self, text: bytes) -> list[int]:
        return list(text)

    def pieces(self, blocks: Iterable[str]) -> Iterator[str]:
        for block in blocks:
            for start in range(0, len(block), PIECE_CHARACTERS):
                yield block[start : start + PIECE_CHARACTERS]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class HubTokenizer:
    """A Hugging Face ``tokenizer.json``; a document ends with the end-of-text token it defines.

    Args:
        path: of the file.
        reads_special_tokens: see :class:`Tokenizer`.

    Raises:
        UserError: if the file is no tokenizer, or has none of the known end-of-text tokens.
    """

    def __init__(self, path: Path, reads_special_tokens: bool = False):
        import tokenizers

        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
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
        self._path = path
        self.end_of_document = known_ends[0]
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.identity = identity_of(content)
        self.reads_special_tokens = reads_special_tokens
        if not reads_special_tokens:
            self._make_spellings_text()

    @cached_property
    def _cuts(self) -> Cuts:
        return find_cuts(json.loads(self._tokenizer.to_str()), self.reads_special_tokens)

    def _make_spellings_text(self) -> None:
        """Let the spellings of special tokens be encoded as any other text."""
        from tokenizers import AddedToken

        # The end of a document is special to us, even if the file does not say so.
        end = self._tokenizer.id_to_token(self.end_of_document)
        self._tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)])
        self._tokenizer.encode_special_tokens = True

        unknown = self._unknown_token()
        self._special_ids = {
            token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special and token.content != unknown
        }

    def _unknown_token(self) -> str | None:
        """Return the token for what the model does not know, which is no spelling."""
        from tokenizers.models import Unigram

        model = self._tokenizer.model
        if not isinstance(model, Unigram):
            return getattr(model, "unk_token", None)
        unknown_id = json.loads(self._tokenizer.to_str())["model"]["unk_id"]
        return None if unknown_id is None else self._tokenizer.id_to_token(unknown_id)

    def __reduce__(self):
        # The library's own pickles lose that spellings are text.
        return HubTokenizer, (self._path, self.reads_special_tokens)

    def encode(self, text: bytes) -> list[int]:
        # Unlike `encode`, this does not keep where in the text each token is.
        texts = [text.decode("utf-8")]
        ids = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)[0].ids
        if not self.reads_special_tokens and not self._special_ids.isdisjoint(ids):
            token = next(token_id for token_id in ids if token_id in self._special_ids)
            raise SpecialTokenError(self._tokenizer.id_to_token(token))
        return ids

    def pieces(self, blocks: Iterable[str]) -> Iterator[str]:
        return self._cuts.pieces(blocks)

    @property
    def cut_obstacle(self) -> str | None:
        return self._cuts.obstacle

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def to_json(self) -> str:
        """Return the tokenizer's own description, as it encodes documents."""
        return self._tokenizer.to_str()


def identity_of(tokenizer_json: bytes) -> str:
    """Return the identity of a tokenizer by the content of its file."""
    return f"sha256:{hashlib.sha256(tokenizer_json).hexdigest()}"


def load_tokenizer(name: str, key: str, reads_special_tokens: bool = False) -> Tokenizer:
    """Load a tokenizer by its ``name``: ``bytes``, or the path of a ``tokenizer.json``.

    Args:
        name: as the user gave it.
        key: the option or recipe key, for errors.
        reads_special_tokens: whether the spelling of a special token is read as that token.

    Raises:
        UserError: if there is no such tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{key}: {name} is neither the word bytes nor the path of a tokenizer.json")
    return HubTokenizer(path, reads_special_tokens)


def recipe_tokenizer(recipe: Recipe, reads_special_tokens: bool = False) -> Tokenizer:
    """Return the tokenizer that ``data.tokenizer`` names, or that the recipe's run keeps.

    Raises:
        UserError: if the recipe trains on a task, whose tokens are not text; or if the run was
            trained with another tokenizer.
    """
    if recipe.data.mqar:
        raise UserError(
            "data.mqar: its tokens are not text; "
            "use `longspan eval mqar RUN` to see what the model has learned"
        )
    of_run = recipe.data.run_tokenizer
    if of_run and not Path(of_run.file).is_file():
        raise UserError(
            f"data.tokenizer: {of_run.file}: no such file, and the run is of a version that kept "
            "no copy; start in the folder that the path is relative to, or put the file into the "
            "run's folder as tokenizer/tokenizer.json"
        )
    tokenizer = load_tokenizer(recipe.data.tokenizer_file, "data.tokenizer", reads_special_tokens)
    if of_run and of_run.identity not in (None, tokenizer.identity):
        raise UserError(
            f"data.tokenizer: {of_run.file} is not the file that the run was trained with, whose "
            f"SHA-256 is {of_run.identity.removeprefix('sha256:')}; restore it"
        )
    return tokenizer


def recipe_vocab_size(recipe: Recipe) -> int:
    """Return the number of ids that the recipe's model knows, before padding."""
    if recipe.data.mqar:
        return recipe.data.mqar.vocab_size
    return recipe.model.vocab_size or recipe_tokenizer(recipe).vocab_size
