"""Questions whose answers stand somewhere in a long text: a needle in a haystack, and tasks after those of RULER
(arXiv 2404.06654), for models that go on with text and were taught no instructions.

Names are made of syllables, values are numbers of five digits. ``length`` counts all tokens of an example, to its last answer.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .held_out import Haystack

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_HOPS = 3
_WORDS = 20


class Asked(NamedTuple):
    """A text with its questions and answers."""

    tokens: list[int]
    answers: list[range]
    """Where the tokens of each answer are."""


class Example(NamedTuple):
    right: Asked
    wrong: list[Asked]
    """For each question the same text up to it, with right answers to those before, and then an answer that is wrong."""


class Question(NamedTuple):
    stem: str
    """Up to the answer, without a space at its end."""
    right: str
    wrong: str
    """Also in the text, but not what is asked for."""


class Puzzle(NamedTuple):
    """What is hidden in a text and asked after it."""

    facts: list[tuple[float, str]]
    """Each with the part of the text that lies before it, 0 to 1."""
    questions: list[Question]
    solved: str = ""
    """A small one with its solution, which stands before the text."""


def needle(random: np.random.Generator, depth: float) -> Puzzle:
    """One number in the text, at a ``depth`` from 0 (its beginning) to 1; another one, anywhere, is wrong."""
    (name, other), (number, wrong) = _names(random, 2), _numbers(random, 2)
    return Puzzle(
        [(depth, _fact(name, number)), (random.random(), _fact(other, wrong))],
        [Question(_stem(name), number, wrong)],
    )


def several(random: np.random.Generator, haystack: Haystack, length: int) -> Puzzle:
    """Four numbers under four names, all asked for one after the other (RULER's multi-query needles); the next is wrong."""
    names, numbers = _names(random, 4), _numbers(random, 4)
    facts = [
        (random.random(), _fact(name, number)) for name, number in zip(names, numbers, strict=True)
    ]
    order = random.permutation(4)
    return Puzzle(
        facts, [Question(_stem(names[i]), numbers[i], numbers[(i + 1) % 4]) for i in order]
    )


def crowd(random: np.random.Generator, haystack: Haystack, length: int) -> Puzzle:
    """As many numbers as fit, each under a name; one is asked for (RULER's multi-key needles), another is wrong."""
    count = max(2, _fitting(haystack, length, _fact("{}", "12345"), beside=_stem("bababa")))
    names, numbers = _names(random, count), _numbers(random, count)
    facts = [
        (i / count, _fact(name, number))
        for i, (name, number) in enumerate(zip(names, numbers, strict=True))
    ]
    one, other = random.choice(count, 2, replace=False)
    return Puzzle(facts, [Question(_stem(names[one]), numbers[one], numbers[other])])


def chain(random: np.random.Generator, haystack: Haystack, length: int) -> Puzzle:
    """A number that is passed on from name to name; the last's is asked for (RULER's variable tracking), another chain's is
    wrong.
    """

    def passed_on(depths: Iterator[float]) -> tuple[list[tuple[float, str]], str, str]:
        names, (number,) = _names(random, _HOPS + 1), _numbers(random, 1)
        facts = [(next(depths), _fact(names[0], number))]
        facts += [
            (next(depths), _fact(after, f"that of {name}")) for name, after in pairwise(names)
        ]
        return facts, f"\nIn digits, the number of {names[-1]} is", number

    def placed() -> Iterator[float]:
        return iter(sorted(random.random(_HOPS + 1)))

    solved, stem, number = passed_on(placed())
    example = "".join(fact for _, fact in solved) + f"{stem} {number}.\n"
    (mine, stem, number), (others, _, other) = passed_on(placed()), passed_on(placed())
    return Puzzle(mine + others, [Question(stem, number, other)], example)


def frequent(random: np.random.Generator, haystack: Haystack, length: int) -> Puzzle:
    """As many words as fit, by Zipf's law with exponent 2; the most frequent is asked for (RULER's frequent words), the second
    is wrong.
    """

    def drawn(count: int) -> tuple[list[str], str, str]:
        names, chances = _names(random, _WORDS), np.arange(1.0, _WORDS + 1) ** -2
        times = np.floor(count * chances / chances.sum()).astype(int)
        times[0] += count - times.sum()
        words = random.permutation(np.repeat(names, times)).tolist()
        return (
            ["\n" + " ".join(words[i : i + 8]) + "\n" for i in range(0, count, 8)],
            names[0],
            names[1],
        )

    stem, (lines, first, _) = "\nThe most frequent word is", drawn(24)
    example = "".join(lines) + f"{stem} {first}.\n"
    lines, first, second = drawn(max(24, _fitting(haystack, length, " {}", beside=example + stem)))
    return Puzzle(
        [(i / len(lines), line) for i, line in enumerate(lines)],
        [Question(stem, first, second)],
        example,
    )


TASKS: dict[str, Callable[[np.random.Generator, Haystack, int], Puzzle]] = {
    task.__name__: task for task in (several, crowd, chain, frequent)
}
"""Of RULER's kind, by name: what makes a puzzle for a text of so many tokens."""


def lay_out(
    puzzle: Puzzle, haystack: Haystack, length: int, random: np.random.Generator
) -> Example:
    """The puzzle in a text of the haystack, ``length`` tokens with the right answers.

    Raises:
        UserError: where it does not fit.
    """
    encode = haystack.tokenizer.encode
    facts = [(depth, encode(fact.encode())) for depth, fact in puzzle.facts]
    solved, asked = encode(puzzle.solved.encode()), _questions(puzzle, haystack)
    room = length - len(solved) - sum(len(fact) for _, fact in facts) - len(asked.right.tokens)
    if room < 0:
        raise UserError(
            f"--lengths: a question and what it asks for take {length - room:,} tokens; use at least 64 more"
        )
    hay, text, done = haystack.text(room, random), solved, 0
    for depth, fact in sorted(facts, key=lambda fact: fact[0]):
        place = round(depth * room)
        text = text + hay[done:place] + fact
        done = place
    text = text + hay[done:]
    return Example(_after(text, asked.right), [_after(text, wrong) for wrong in asked.wrong])


def _questions(puzzle: Puzzle, haystack: Haystack) -> Example:
    """All questions with their answers, without the text."""
    encode, tokens, answers, wrong = haystack.tokenizer.encode, [], [], []

    def answered(stem: str, answer: str) -> tuple[list[int], range]:
        alone, whole = encode(stem.encode()), encode(f"{stem} {answer}".encode())
        same = next(
            (i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b),
            min(len(alone), len(whole)),
        )
        return tokens + whole, range(len(tokens) + same, len(tokens) + len(whole))

    for question in puzzle.questions:
        instead, where = answered(question.stem, question.wrong)
        wrong.append(Asked(instead, [where]))
        tokens, where = answered(question.stem, question.right)
        answers.append(where)
    return Example(Asked(tokens, answers), wrong)


def _after(text: list[int], asked: Asked) -> Asked:
    return Asked(
        text + asked.tokens,
        [range(place.start + len(text), place.stop + len(text)) for place in asked.answers],
    )


def _fitting(haystack: Haystack, length: int, fact: str, beside: str) -> int:
    """How many such facts, with names for ``{}``, fill about nine tenths of what is left ``beside`` a text."""
    encode = haystack.tokenizer.encode
    tried = "".join(fact.format(name) for name in _names(np.random.default_rng(0), 64))
    return (
        max(0, length - 16 - len(encode(beside.encode())))
        * 64
        * 9
        // 10
        // len(encode(tried.encode()))
    )


def _stem(name: str) -> str:
    """Begins a line: so its tokens are the same in a fact and in a question."""
    return f"\nThe number of {name} is"


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
