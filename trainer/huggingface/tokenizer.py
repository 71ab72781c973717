"""A recipe's tokenizer as ``transformers`` loads it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.tokenizer import ByteTokenizer, recipe_tokenizer
from ..recipe.schema import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def write_tokenizer(recipe: Recipe, folder: Path, max_length: int) -> dict[str, int]:
    """Write ``tokenizer.json`` and its config, unless the data is not text.

    Returns:
        The ids of special tokens, by their names in the configs of the model and of generation.
    """
    if recipe.data.mqar:
        return {}
    tokenizer = recipe_tokenizer(recipe)
    end_id = tokenizer.end_of_document
    hf_tokenizer = byte_tokenizer() if isinstance(tokenizer, ByteTokenizer) else _from_file(recipe)
    hf_tokenizer.save(str(folder / "tokenizer.json"))

    end_token = hf_tokenizer.id_to_token(end_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_token,
        "pad_token": end_token,
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return {"eos_token_id": end_id, "pad_token_id": end_id}


def _from_file(recipe: Recipe) -> "Tokenizer":
    from tokenizers import Tokenizer

    return Tokenizer.from_file(recipe.data.tokenizer)


def byte_tokenizer() -> "Tokenizer":
    """Make a tokenizer in which each byte is its own id and 256 ends a document."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: byte for byte, letter in _byte_letters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return tokenizer


def _byte_letters() -> dict[int, str]:
    """Return GPT-2's printable letter for every byte.

    Bytes that print stand for themselves; the others, in order, for the characters after 255.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    for index, byte in enumerate(others):
        letters[byte] = chr(256 + index)
    return letters
