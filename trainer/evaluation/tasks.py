"""Questions whose answers stand somewhere in a long text: a needle in a haystack, and tasks after those of RULER
(arXiv 2404.06654), for models that go on with text and were taught no instructions.

Names are words that no text has, values numbers of five digits. ``length`` counts all tokens of an example, to its last answer.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .held_out import Haystack

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


class Asked(NamedTuple):
    """A text with its questions and answers."""

    tokens: list[int]
    answers: list[range]
    """Where the tokens of each answer are."""


class Example(NamedTuple):
    right: Asked
    wrong: Asked
    """The same text and questions with answers that are as good, but for what the text says."""


class Question(NamedTuple):
    stem: str
    """Up to the answer, without a space at its end."""
    right: str
    wrong: str


class Puzzle(NamedTuple):
    """What is hidden in a text and asked after it."""

    facts: list[tuple[float, str]]
    """Each with the part of the text that lies before it, 0 to 1."""
    questions: list[Question]
    solved: str = ""
    """A small one with its solution, which stands before the text."""


def needle(random: np.random.Generator, depth: float) -> Puzzle:
    """One number in the text, at a ``depth`` from 0 (its beginning) to 1."""
    (name,), numbers = _names(random, 1), _numbers(random, 2)
    return Puzzle([(depth, _fact(name, numbers[0]))], [Question(_stem(name), *numbers)])


def several(random: np.random.Generator, count: int = 4) -> Puzzle:
    """Numbers under several names, all asked for one after the other (RULER's multi-query needles)."""
    names, numbers, other = _names(random, count), _numbers(random, count), _numbers(random, count)
    facts = [(depth, _fact(name, number)) for depth, name, number in zip(random.random(count), names, numbers, strict=True)]
    order = random.permutation(count)
    return Puzzle(facts, [Question(_stem(names[i]), numbers[i], other[i]) for i in order])


def crowd(random: np.random.Generator, count: int) -> Puzzle:
    """Numbers under so many names, and little else; one is asked for (RULER's multi-key needles), another's is wrong."""
    names, numbers = _names(random, count), _numbers(random, count)
    facts = [(i / count, _fact(name, number)) for i, (name, number) in enumerate(zip(names, numbers, strict=True))]
    one, other = random.choice(count, 2, replace=False)
    return Puzzle(facts, [Question(_stem(names[one]), numbers[one], numbers[other])])


def chain(random: np.random.Generator, hops: int = 3) -> Puzzle:
    """A number that is passed on from name to name; the last's is asked for (RULER's variable tracking), another chain's is
    wrong.
    """

    def passed_on(depths: Iterator[float]) -> tuple[list[tuple[float, str]], str, str]:
        names, (number,) = _names(random, hops + 1), _numbers(random, 1)
        facts = [(next(depths), _fact(names[0], number))]
        facts += [(next(depths), f"{_stem(after)} that of {name}.\n") for name, after in pairwise(names)]
        return facts, f"In digits, {_stem(names[-1]).lower()}", number

    solved, stem, number = passed_on(iter(range(hops + 1)))
    example = "".join(fact for _, fact in solved) + f"{stem} {number}.\n\n"
    (mine, stem, number), (others, _, other) = (passed_on(iter(sorted(random.random(hops + 1)))) for _ in range(2))
    return Puzzle(mine + others, [Question(stem, number, other)], example)


def frequent(random: np.random.Generator, count: int) -> Puzzle:
    """Words that follow Zipf's law; the most frequent is asked for (RULER's frequent words), the second is wrong."""

    def drawn(count: int) -> tuple[list[str], str, str]:
        names = _names(random, 20)
        chances = 1 / np.arange(1, 21.0) ** 2
        times = np.floor(count * chances / chances.sum()).astype(int)
        times[0] += count - times.sum()
        return random.permutation(np.repeat(names, times)).tolist(), names[0], names[1]

    def told(words: list[str]) -> list[str]:
        return [" ".join(words[i : i + 8]) + "\n" for i in range(0, len(words), 8)]

    stem, (words, first, _) = "The most frequent word is", drawn(24)
    example = "".join(told(words)) + f"{stem} {first}.\n\n"
    words, first, second = drawn(count)
    lines = told(words)
    return Puzzle([(i / len(lines), line) for i, line in enumerate(lines)], [Question(stem, first, second)], example)


TASKS: dict[str, Callable[[np.random.Generator, Haystack, int], Puzzle]] = {
    "several": lambda random, haystack, length: several(random),
    "crowd": lambda random, haystack, length: crowd(random, max(2, _fitting(haystack, length, _fact("{}", "12345")))),
    "chain": lambda random, haystack, length: chain(random),
    "frequent": lambda random, haystack, length: frequent(random, max(40, _fitting(haystack, length, " {}"))),
}
"""Of RULER's kind, by name: what makes a puzzle for a text of so many tokens."""


def lay_out(puzzle: Puzzle, haystack: Haystack, length: int, random: np.random.Generator) -> Example:
    """The puzzle in a text of the haystack, ``length`` tokens in all, or a few less.

    Raises:
        UserError: where it does not fit.
    """
    encode = haystack.tokenizer.encode
    facts = sorted(((depth, encode(fact.encode())) for depth, fact in puzzle.facts), key=lambda fact: fact[0])
    solved, right, wrong = (encode(puzzle.solved.encode()), *(_questions(puzzle, haystack, which) for which in (1, 2)))
    taken = len(solved) + sum(len(fact) for _, fact in facts) + max(len(right.tokens), len(wrong.tokens))
    if taken > length:
        raise UserError(f"--lengths: {length:,} tokens are too few: a question and what it asks for take {taken:,}; use more")
    pieces = haystack.pieces(length - taken, random)
    total, text, before = sum(map(len, pieces)), [*solved], 0
    for piece in pieces:
        while facts and facts[0][0] * total <= before:
            text += facts.pop(0)[1]
        text += piece
        before += len(piece)
    text += [token for _, fact in facts for token in fact]
    return Example(*(_after(text, asked) for asked in (right, wrong)))


def _questions(puzzle: Puzzle, haystack: Haystack, which: int) -> Asked:
    """All questions with their right (1) or wrong (2) answers."""
    encode, tokens, answers = haystack.tokenizer.encode, [], []
    for number, question in enumerate(puzzle.questions):
        stem = (".\n" if number else "\n") + question.stem
        alone, whole = encode(stem.encode()), encode(f"{stem} {question[which]}".encode())
        same = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole)))
        answers.append(range(len(tokens) + same, len(tokens) + len(whole)))
        tokens += whole
    return Asked(tokens, answers)


def _after(text: list[int], asked: Asked) -> Asked:
    answers = [range(answer.start + len(text), answer.stop + len(text)) for answer in asked.answers]
    return Asked(text + asked.tokens, answers)


def _fitting(haystack: Haystack, length: int, fact: str) -> int:
    """How many such facts, with names for ``{}``, fill about nine tenths of a text, but for a question and an example."""
    tried = "".join(fact.format(name) for name in _names(np.random.default_rng(0), 64))
    return (length - 512) * 64 * 9 // 10 // len(haystack.tokenizer.encode(tried.encode()))


def _stem(name: str) -> str:
    return f"The number of {name} is"


def _fact(name: str, number: str) -> str:
    return f"{_stem(name)} {number}.\n"


def _names(random: np.random.Generator, count: int) -> list[str]:
    """Different words of three syllables or, of very many, four."""
    syllables, found = 3 if count < 10_000 else 4, {}
    while len(found) < count:
        drawn = random.integers(len(_SYLLABLES), size=(count, syllables))
        found |= dict.fromkeys("".join(_SYLLABLES[number] for number in word) for word in drawn)
    return list(found)[:count]


def _numbers(random: np.random.Generator, count: int) -> list[str]:
    """Different numbers, as long as there are some."""
    return [str(10_000 + number) for number in random.choice(90_000, count, replace=count > 90_000)]
