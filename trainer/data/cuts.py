"""Where a long text can be cut, so that the ids of the parts are those of the whole.

It is cut before a single space between two letters. What follows proves for a tokenizer that
nothing in it looks across such a place, from the tokenizer's own description (``tokenizer.json``):

- no added token contains a letter with a space behind it, and none takes spaces behind it;
- the normalizers and pre-tokenizers look at one character at a time, or at matches of a regular
  expression that can neither contain a letter with a space behind it nor look around there;
- the model joins no letter with a space behind it: no token of the vocabulary of BPE contains
  both, or else the pre-tokenizer has cut there itself.

A tokenizer for which this cannot be shown gets every document whole.
"""

import re
from collections.abc import Iterable, Iterator
from re import _constants as codes  # type: ignore[attr-defined]  # the parser is not public
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

PIECE_CHARACTERS = 1 << 18
"""A text is cut at the first place after this many characters."""

_PLACE = re.compile(r"[^\W\d_](?= [^\W\d_])")
_LETTER_AND_SPACE = re.compile(r"[^\W\d_][ ▁]")
_LETTER_AND_SPACE_AS_BYTES = re.compile("[A-Za-z\u00a1-\u00ff\u0122-\U0010ffff]Ġ")
"""In GPT-2's letters for bytes: the last byte of a letter is in ASCII or from 0x80 on, whose
letters are U+00A1 to U+00FF and those from U+0122 on.
"""
_SENTENCEPIECE_SPACE = "▁"
_GPT2_SPACE = "Ġ"

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The regular expression of the pre-tokenizer ByteLevel."""

_LOCAL_NORMALIZERS = {
    "BertNormalizer",
    "Lowercase",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Nmt",
    "Precompiled",
    "StripAccents",
}
"""Those to which the characters on the two sides of the place are nothing to each other."""

_LOCAL_PRE_TOKENIZERS = {
    # Whether they cut between a letter and a space.
    "BertPreTokenizer": True,
    "Digits": False,
    "Punctuation": False,
    "Whitespace": True,
    "WhitespaceSplit": True,
}


class Cuts(NamedTuple):
    """How a tokenizer lets texts be cut."""

    obstacle: str | None
    """Why it cannot be shown that it lets them; None if it does."""
    drops_space: bool = False
    """Whether a part begins behind the space, because the tokenizer puts one before every text."""

    def pieces(self, blocks: Iterable[str]) -> Iterator[str]:
        """Cut a text, given in blocks, into parts that are encoded alone."""
        if self.obstacle:
            yield "".join(blocks)
            return
        text = ""
        for block in blocks:
            searched = max(0, len(text) - 2)
            text += block
            start = 0  # of the next part
            while match := _PLACE.search(text, max(start + PIECE_CHARACTERS, searched)):
                yield text[start : match.end()]
                start = match.end() + self.drops_space
            text = text[start:]
        if text:
            yield text


class _ObstacleError(Exception):
    """Something that may look across a place."""


def find_cuts(description: dict[str, Any], reads_special_tokens: bool) -> Cuts:
    """Return how texts can be cut for a tokenizer.

    Args:
        description: of the tokenizer, the content of its ``tokenizer.json``.
        reads_special_tokens: whether special tokens are found in text.
    """
    try:
        for token in description["added_tokens"]:
            if reads_special_tokens or not token["special"]:
                _check_added_token(token)
        space, drops_space = _check_normalizers(_steps(description["normalizer"], "normalizers"))
        steps = _steps(description["pre_tokenizer"], "pretokenizers")
        if not _cuts_itself(steps, space):
            _check_model(description["model"], _space_in_tokens(steps, space))
    except _ObstacleError as obstacle:
        return Cuts(str(obstacle))
    except (KeyError, TypeError):
        return Cuts("its description is of a form that is not known")
    return Cuts(None, drops_space)


def _steps(step: dict | None, key: str) -> list[dict]:
    """Return the steps of a part of a tokenizer, which may be nested sequences under ``key``."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for outer in step[key] for inner in _steps(outer, key)]
    return [step]


def _check_added_token(token: dict) -> None:
    content = token["content"]
    if (
        _LETTER_AND_SPACE.search(content)
        or (token["rstrip"] and content[-1:].isalpha())
        or (token["single_word"] and content[:1] in (" ", _SENTENCEPIECE_SPACE))
    ):
        raise _ObstacleError(f"its added token {content!r} may span words")


def _check_normalizers(steps: list[dict]) -> tuple[str, bool]:
    """Return what becomes of a space, and whether one is put before every text."""
    space = " "
    prepended = None
    for step in steps:
        if step["type"] == "Prepend" and prepended is None:
            prepended = step["prepend"]
        elif step["type"] == "Replace":
            pattern = step["pattern"]
            if pattern == {"String": " "} and space == " " and len(step["content"]) == 1:
                space = step["content"]
            else:
                _check_pattern(pattern, space)
        elif step["type"] not in _LOCAL_NORMALIZERS:
            raise _ObstacleError(f"its normalizer {step['type']} may look at a whole text")
    if prepended not in (None, space) or (prepended and space != _SENTENCEPIECE_SPACE):
        raise _ObstacleError(f"its normalizer puts {prepended!r} before every text")
    return space, prepended is not None


def _cuts_itself(steps: list[dict], space: str) -> bool:
    """Check pre-tokenizers, and return whether they certainly cut before the space."""
    cuts = False
    for number, step in enumerate(steps):
        kind = step["type"]
        if kind in ("ByteLevel", "Metaspace") and number < len(steps) - 1:
            raise _ObstacleError(f"its pre-tokenizer {kind} changes the text for others")
        if kind == "ByteLevel":
            if step.get("use_regex", True):
                _check_pattern({"Regex": _GPT2_SPLIT}, space)
        elif kind == "Metaspace":
            cuts |= step.get("split", True)
        elif kind == "Split":
            _check_pattern(step["pattern"], space)
        elif kind == "CharDelimiterSplit":
            cuts |= step["delimiter"] == space
        elif kind in _LOCAL_PRE_TOKENIZERS:
            cuts |= _LOCAL_PRE_TOKENIZERS[kind] and space == " "
        else:
            raise _ObstacleError(f"its pre-tokenizer {kind} may look at a whole text")
    return cuts


def _space_in_tokens(steps: list[dict], space: str) -> str:
    """Return what a space is to the model."""
    for step in steps:
        if step["type"] == "ByteLevel":
            return _GPT2_SPACE
        if step["type"] == "Metaspace":
            return step["replacement"]
    return space


def _check_model(model: dict, space: str) -> None:
    """Check a model that may be given a letter and a space together."""
    if model["type"] != "BPE":
        raise _ObstacleError(
            f"its pre-tokenizer may give several words to its {model['type']} model"
        )
    if model.get("dropout"):
        raise _ObstacleError("its model drops merges at random")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _ObstacleError("its model marks the beginning or the end of what it is given")
    vocabulary = model["vocab"]
    if model.get("fuse_unk") and space not in vocabulary:
        raise _ObstacleError("its model may join unknown letters and spaces")
    in_bytes = space == _GPT2_SPACE
    both = _LETTER_AND_SPACE_AS_BYTES if in_bytes else re.compile(rf"[^\W\d_]{re.escape(space)}")
    for token in vocabulary:
        if both.search(token):
            raise _ObstacleError(f"its token {token!r} spans words")


# ---- regular expressions ----

_CATEGORIES = {
    # A category of Unicode, as the letters (any one of Unicode's stands for all) and the space in
    # it; the rest of it does not matter here.
    "L": r"\w",
    **dict.fromkeys(("Lu", "Ll", "Lt", "Lm", "Lo", "Latin", "Cyrillic", "Greek"), "a"),
    **dict.fromkeys(("Han", "Hiragana", "Katakana", "Hangul", "Thai", "Arabic", "Hebrew"), "a"),
    **dict.fromkeys(("M", "Mn", "Mc", "Me", "N", "Nd", "Nl", "No"), "0"),
    **dict.fromkeys(("P", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po"), "0"),
    **dict.fromkeys(("S", "Sm", "Sc", "Sk", "So", "C", "Cc", "Cf"), "0"),
    **dict.fromkeys(("Z", "Zs"), " "),
}
"""``\\w`` for all letters, ``a`` for some of them, ``0`` for none."""


class _Facts(NamedTuple):
    """What is known of the texts that a part of a regular expression matches.

    Each is True if it may be so for one of them.
    """

    is_empty: bool
    starts_with_space: bool
    ends_with_letter: bool
    has_place: bool
    """Whether it has a letter with a space behind it."""

    def then(self, after: "_Facts") -> "_Facts":
        """Return the facts of this part followed by another."""
        return _Facts(
            self.is_empty and after.is_empty,
            self.starts_with_space or (self.is_empty and after.starts_with_space),
            after.ends_with_letter or (after.is_empty and self.ends_with_letter),
            self.has_place
            or after.has_place
            or (self.ends_with_letter and after.starts_with_space),
        )

    def or_else(self, other: "_Facts") -> "_Facts":
        """Return the facts of this part or another."""
        return _Facts(*(mine or others for mine, others in zip(self, other, strict=True)))


_NOTHING = _Facts(True, False, False, False)


def _check_pattern(pattern: dict[str, str], space: str) -> None:
    """Require that matches neither have a place in them nor depend on what is beyond.

    Matching is then the same on both sides of a place as in the whole text: no match contains it,
    nothing looks back across it, and what looks ahead finds the same at the end of a text.
    """
    regex = re.escape(pattern["String"]) if "String" in pattern else pattern["Regex"]
    try:
        facts = _facts(parser.parse(_python_regex(regex)), space)
    except (re.error, OverflowError, RecursionError):
        raise _ObstacleError(f"its pattern {regex!r} cannot be analyzed") from None
    if facts.has_place or facts.is_empty:
        raise _ObstacleError(f"its pattern {regex!r} may match several words")


def _python_regex(regex: str) -> str:
    """Translate from Oniguruma, as far as letters and the space go."""
    if "&&" in regex or "[[" in regex or "[^[" in regex or r"\P" in regex:
        raise re.error("sets of sets")

    def category(match: re.Match[str]) -> str:
        if match[1] not in _CATEGORIES:
            raise re.error(f"unknown category {match[1]}")
        return _CATEGORIES[match[1]]

    return re.sub(r"\\p\{(\w+)\}", category, regex)


def _facts(nodes: Iterable[tuple[Any, Any]], space: str) -> _Facts:
    facts = _NOTHING
    for code, value in nodes:
        facts = facts.then(_facts_of_node(code, value, space))
    return facts


def _facts_of_node(code: Any, value: Any, space: str) -> _Facts:
    if code in (codes.LITERAL, codes.NOT_LITERAL, codes.IN, codes.ANY):
        letter, matches_space = _letter_and_space(code, value, space)
        return _Facts(False, matches_space, letter, False)
    if code is codes.BRANCH:
        first, *others = (_facts(branch, space) for branch in value[1])
        for other in others:
            first = first.or_else(other)
        return first
    if code is codes.SUBPATTERN:
        return _facts(value[-1], space)
    if code is codes.ATOMIC_GROUP:
        return _facts(value, space)
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
        least, most, repeated = value
        facts = _facts(repeated, space)
        if most > 1:
            facts = facts.then(facts)
        return facts.or_else(_NOTHING) if least == 0 else facts
    if code in (codes.ASSERT, codes.ASSERT_NOT):
        direction, inner = value
        facts = _facts(inner, space)
        # At the place itself, what begins with a space sees one or the end of the text.
        sees_end = facts.starts_with_space and not facts.is_empty
        if direction > 0 and not facts.has_place and not sees_end:
            return _NOTHING
    raise re.error(f"{code} looks around")


def _letter_and_space(code: Any, value: Any, space: str) -> tuple[bool, bool]:
    """Return whether a part that matches one character may match a letter, and the space."""
    if code is codes.ANY:
        return True, True
    if code is codes.LITERAL:
        return chr(value).isalpha(), chr(value) == space
    if code is codes.NOT_LITERAL:
        return True, chr(value) != space

    is_negated = value[0][0] is codes.NEGATE
    items = value[1:] if is_negated else value
    some_letter = any(_has_some_letter(kind, item) for kind, item in items)
    every_letter = any(_has_every_letter(kind, item) for kind, item in items)
    has_space = any(_has(kind, item, space) for kind, item in items)
    if is_negated:
        return not every_letter, not has_space
    return some_letter, has_space


def _has_some_letter(code: Any, value: Any) -> bool:
    if code is codes.LITERAL:
        return chr(value).isalpha()
    if code is codes.RANGE:
        first, last = value
        return last >= 0x80 or any(chr(point).isalpha() for point in range(first, last + 1))
    return value not in (codes.CATEGORY_SPACE, codes.CATEGORY_DIGIT)


def _has_every_letter(code: Any, value: Any) -> bool:
    """Whether an item of a set has all letters; a category that has not all is taken for none."""
    return code is codes.CATEGORY and value in (
        codes.CATEGORY_WORD,
        codes.CATEGORY_NOT_SPACE,
        codes.CATEGORY_NOT_DIGIT,
    )


def _has(code: Any, value: Any, space: str) -> bool:
    if code is codes.LITERAL:
        return value == ord(space)
    if code is codes.RANGE:
        return value[0] <= ord(space) <= value[1]
    is_white = space.isspace()
    return {
        codes.CATEGORY_SPACE: is_white,
        codes.CATEGORY_NOT_SPACE: not is_white,
        codes.CATEGORY_WORD: False,
        codes.CATEGORY_NOT_WORD: True,
        codes.CATEGORY_DIGIT: False,
        codes.CATEGORY_NOT_DIGIT: True,
    }[value]
