"""A recipe's tokenizer as ``transformers`` loads it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.tokenizer import ByteTokenizer, HubTokenizer, SpecialTokenError, recipe_tokenizer
from ..errors import UserError
from ..recipe.schema import Recipe
from .folder import loading

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig


TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces,\ttabs\r\nand   ends of lines\n\n  ",
    "def f(x):\n    return x ** 2 - 1234567.89  # it's one's own\n",
    "naïve Ærø, ĳssel e\u0301 \u2014 漢字、かな。 Ελληνικά русский עברית हिन्दी 🙂👩‍🚀",
    "<html> & </s> [EOS] {json: null}",
)
"""What an exported tokenizer is compared on."""


def write_tokenizer(recipe: Recipe, folder: Path, max_length: int) -> dict[str, int]:
    """Write ``tokenizer.json`` and its config, unless the data is not text.

    Returns:
        The ids of special tokens, by their names in the configs of the model and of generation.
    """
    if recipe.data.mqar:
        return {}
    tokenizer = _trained_tokenizer(recipe)
    end_id = tokenizer.end_of_document
    if isinstance(tokenizer, HubTokenizer):
        hf_tokenizer = _without_added_ids(tokenizer)
    else:
        hf_tokenizer = byte_tokenizer()
    hf_tokenizer.save(str(folder / "tokenizer.json"))

    end_token = hf_tokenizer.id_to_token(end_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_token,
        "pad_token": end_token,
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": not tokenizer.reads_special_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return {"eos_token_id": end_id, "pad_token_id": end_id}


def require_same_tokens(recipe: Recipe, folder: Path, config: "PreTrainedConfig") -> int | None:
    """Require that the tokenizer of an exported folder gives the ids that the run was trained on.

    Args:
        recipe: of the run.
        folder: with the tokenizer.
        config: of the folder's model.

    Returns:
        The number of texts that were compared; None if the run was not trained on text.

    Raises:
        UserError: naming what differs.
    """
    if recipe.data.mqar:
        return None
    from transformers import AutoTokenizer

    tokenizer = _trained_tokenizer(recipe)
    with loading(str(folder)):
        hf_tokenizer = AutoTokenizer.from_pretrained(folder)

    end_id = tokenizer.end_of_document
    for name, token_id in (("bos", None), ("eos", end_id), ("pad", end_id)):
        for file, owner in (("config.json", config), ("tokenizer_config.json", hf_tokenizer)):
            found = getattr(owner, f"{name}_token_id")
            if found != token_id:
                raise UserError(
                    f"{folder}/{file}: {name} is token {found}, but the run was trained with "
                    f"{'none' if token_id is None else token_id}; export the run again"
                )

    end_token = hf_tokenizer.convert_ids_to_tokens(end_id)
    texts = (*TEXTS, f"in {end_token} a text")
    for text in texts:
        try:
            ids = tokenizer.encode(text.encode())
        except SpecialTokenError:
            continue  # no corpus has such a text
        hf_ids = hf_tokenizer(text).input_ids
        if ids != hf_ids:
            raise UserError(
                f"{folder}/tokenizer.json: the text {text!r} becomes {_differing(hf_ids, ids)}, "
                f"and became {_differing(ids, hf_ids)} in the run's corpus; export the run again"
            )
    return len(texts)


def _trained_tokenizer(recipe: Recipe) -> HubTokenizer | ByteTokenizer:
    """Return the tokenizer as the run's corpora were built with it."""
    of_run = recipe.data.run_tokenizer
    tokenizer = recipe_tokenizer(recipe, bool(of_run and of_run.reads_special_tokens))
    assert isinstance(tokenizer, HubTokenizer | ByteTokenizer)
    return tokenizer


def _differing(ids: list[int], other_ids: list[int]) -> str:
    """Return the first few ids from where two lists differ."""
    same = 0
    while same < min(len(ids), len(other_ids)) and ids[same] == other_ids[same]:
        same += 1
    shown = ", ".join(map(str, ids[same : same + 4])) or "nothing"
    return f"{shown} at token {same}"


def _without_added_ids(tokenizer: HubTokenizer) -> "Tokenizer":
    """Return a tokenizer without the post-processor that puts ids around a text: none is in a
    corpus.
    """
    from tokenizers import Tokenizer

    description = json.loads(tokenizer.to_json())
    description["post_processor"] = _offsets_alone(description["post_processor"])
    return Tokenizer.from_str(json.dumps(description))


def _offsets_alone(post_processor: dict | None) -> dict | None:
    """Return the part of a post-processor that adds no ids."""
    if post_processor is None:
        return None
    if post_processor["type"] == "Sequence":
        parts = [_offsets_alone(part) for part in post_processor["processors"]]
        return next((part for part in parts if part), None)
    return post_processor if post_processor["type"] == "ByteLevel" else None


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
