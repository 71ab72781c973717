"""Small tokenizers of the kinds that published models have."""

from pathlib import Path

from longspan.trainer.data.tokenizer import HubTokenizer
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

END = "<|endoftext|>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
TRAINING = [
    "the cat sat on the mat, the dog's bone isn't it?\n\nAnd  then 12345 words  more.\n",
    "def f(x):\n    return x  # the end of the function\n",
    "größer als ein Haus; 漢字 かな русский текст и слова",
] * 4


def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Regular expressions one after another, then bytes."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def trained(model, trainer, normalizer=None, pre_tokenizer=None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer


def byte_level(pre_tokenizer=None, normalizer=None, specials=(END,)) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = trained(models.BPE(), trainer, normalizer, pre_tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _llama2(**kinds) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    return trained(models.BPE(unk_token="<unk>", fuse_unk=True), trainer, **kinds)


def _llama2_old() -> Tokenizer:
    """One whose normalizer puts a space before every text, and which has no pre-tokenizer."""
    tokenizer = _llama2(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never"),
    )
    tokenizer.pre_tokenizer = None
    return tokenizer


def _t5() -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    return trained(models.Unigram(), trainer, normalizers.NFKC(), pre_tokenizers.Sequence(steps))


def _bert() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[EOS]"], show_progress=False
    )
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )


def _added() -> Tokenizer:
    """One with tokens for spaces and a word, as GPT-NeoX and Phi have them."""
    tokenizer = byte_level()
    tokenizer.add_tokens(
        [AddedToken(" " * count, normalized=False) for count in (2, 4)]
        + [AddedToken("the", single_word=True, lstrip=True, normalized=False)]
    )
    return tokenizer


KINDS = {
    "gpt2": byte_level,
    "gpt2, prefix space": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: byte_level(split(LLAMA3)),
    "o200k, NFC": lambda: byte_level(split(O200K), normalizers.NFC()),
    "deepseek": lambda: byte_level(
        split(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK)
    ),
    "added tokens": _added,
    "llama2": lambda: _llama2(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")),
    "llama2, old": _llama2_old,
    "t5": _t5,
    "bert": _bert,
}


def load(tokenizer: Tokenizer, folder: Path, reads_special_tokens: bool = False) -> HubTokenizer:
    """Return it as the product reads it from a file."""
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return HubTokenizer(path, reads_special_tokens)
