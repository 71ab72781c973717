"""A recipe's tokenizer as ``transformers`` loads it."""

import json
from pathlib import Path

from ..data.tokenizer import ByteTokenizer, recipe_tokenizer
from ..recipe.schema import Recipe


def write_tokenizer(recipe: Recipe, folder: Path, longest: int) -> dict[str, int]:
    """``tokenizer.json`` and its config; the ids that models and generation take of it. Nothing where the data is no text."""
    if recipe.data.mqar:
        return {}
    ours = recipe_tokenizer(recipe)
    if isinstance(ours, ByteTokenizer):
        theirs = byte_tokenizer()
    else:
        from tokenizers import Tokenizer

        theirs = Tokenizer.from_file(recipe.data.tokenizer)
    end = theirs.id_to_token(ours.end_of_document)
    theirs.save(str(folder / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
    return {"eos_token_id": ours.end_of_document, "pad_token_id": ours.end_of_document}


def byte_tokenizer():
    """Each byte is its own id and 256 ends a document, as a ``tokenizers.Tokenizer``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's printable stand-ins: bytes that print stand for themselves, the others for what comes after 255.
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: byte for byte, letter in letters.items()}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return tokenizer
