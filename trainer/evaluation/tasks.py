"""Puzzles to hide in a long text: a needle in a haystack, and tasks of RULER's kind.

RULER is arXiv 2404.06654. The puzzles are for models that continue text and were trained on no
instructions. Names are made of syllables, and values are numbers of five digits.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .held_out import Haystack

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_NEEDLES = 4
"""Numbers of the multi-query task."""
_HOPS = 3
"""How often a number is passed on in the variable-tracking task."""
_WORDS = 20
"""Different words of the frequent-words task."""
_EXAMPLE_WORDS = 24
"""Words of the solved example of that task, and the least of the task itself."""


class Fact(NamedTuple):
    """A line to hide in the text."""

    depth: float
    """The part of the text that lies before it, from 0 to 1."""
    text: str


class Question(NamedTuple):
    """What is asked at the end of the text."""

    stem: str
    """All up to the answer, without a space at its end."""
    right: str
    wrong: str
    """Another answer, which is also in the text."""


class Puzzle(NamedTuple):
    """What is hidden in a text and asked at its end."""

    facts: list[Fact]
    questions: list[Question]
    solved_example: str = ""
    """A small puzzle with its answer, which stands before the text."""


def needle(random: np.random.Generator, depth: float) -> Puzzle:
    """Hide one number at a ``depth`` from 0 (the beginning) to 1; another, anywhere, is wrong."""
    name, other_name = _names(random, 2)
    number, other_number = _numbers(random, 2)
    facts = [
        Fact(depth, _sentence(name, number)),
        Fact(random.random(), _sentence(other_name, other_number)),
    ]
    return Puzzle(facts, [Question(_stem(name), number, other_number)])


def multi_query(random: np.random.Generator, haystack: Haystack, length: int) -> Puzzle:
    """Hide four numbers under four names, and ask for all, one after another.

    RULER's multi-query needles (``niah_multiquery``). The number of the next name is wrong.
    """
    names = _names(random, _NEEDLES)
    numbers = _numbers(random, _NEEDLES)
    facts = [
        Fact(random.random(), _sentence(name, number))
        for name, number in zip(names, numbers, strict=True)
    ]
    questions = [
        Question(_stem(names[i]), numbers[i], numbers[(i + 1) % _NEEDLES])
        for i in random.permutation(_NEEDLES)
    ]
    return Puzzle(facts, questions)


def multi_key(random: np.random.Generator, haystack: Haystack, length: int) -> Puzzle:
    """Hide as many numbers as fit, each under a name, and ask for one of them.

    RULER's multi-key needles (``niah_multikey``). Another one of the numbers is wrong.
    """
    count = max(2, _fitting(haystack, length, _sentence("{}", "12345"), reserved=_stem("bababa")))
    names = _names(random, count)
    numbers = _numbers(random, count)
    facts = [
        Fact(i / count, _sentence(name, number))
        for i, (name, number) in enumerate(zip(names, numbers, strict=True))
    ]
    asked, other = random.choice(count, 2, replace=False)
    return Puzzle(facts, [Question(_stem(names[asked]), numbers[asked], numbers[other])])


def variable_tracking(random: np.random.Generator, haystack: Haystack, length: int) -> Puzzle:
    """Pass a number on from name to name, and ask for the last name's.

    RULER's variable tracking (``vt``). The number of another chain, which runs between, is wrong.
    """
    solved = _chain(random)
    asked = _chain(random)
    other = _chain(random)
    solved_facts = "".join(fact.text for fact in solved.facts)
    return Puzzle(
        asked.facts + other.facts,
        [Question(asked.stem, asked.number, other.number)],
        solved_example=f"{solved_facts}{solved.stem} {solved.number}.\n",
    )


class _Chain(NamedTuple):
    facts: list[Fact]
    stem: str
    """Asks for the number of the last name."""
    number: str


def _chain(random: np.random.Generator) -> _Chain:
    depths = sorted(random.random(_HOPS + 1))
    names = _names(random, _HOPS + 1)
    (number,) = _numbers(random, 1)
    values = [number, *(f"that of {name}" for name in names[:-1])]
    facts = [
        Fact(depth, _sentence(name, value))
        for depth, name, value in zip(depths, names, values, strict=True)
    ]
    return _Chain(facts, f"\nIn digits, the number of {names[-1]} is", number)


def frequent_words(random: np.random.Generator, haystack: Haystack, length: int) -> Puzzle:
    """Hide as many words as fit, by Zipf's law with exponent 2, and ask for the most frequent one.

    RULER's frequent words extraction (``fwe``). The second most frequent word is wrong.
    """
    stem = "\nThe most frequent word is"
    solved = _zipf_words(random, _EXAMPLE_WORDS)
    solved_example = f"{''.join(solved.lines)}{stem} {solved.most_frequent}.\n"

    count = _fitting(haystack, length, " {}", reserved=solved_example + stem)
    words = _zipf_words(random, max(_EXAMPLE_WORDS, count))
    facts = [Fact(i / len(words.lines), line) for i, line in enumerate(words.lines)]
    question = Question(stem, words.most_frequent, words.second)
    return Puzzle(facts, [question], solved_example)


class _ZipfWords(NamedTuple):
    lines: list[str]
    """Of eight words each."""
    most_frequent: str
    second: str


def _zipf_words(random: np.random.Generator, count: int) -> _ZipfWords:
    names = _names(random, _WORDS)
    frequencies = np.arange(1.0, _WORDS + 1) ** -2
    times = np.floor(count * frequencies / frequencies.sum()).astype(int)
    times[0] += count - times.sum()
    words = random.permutation(np.repeat(names, times)).tolist()
    lines = ["\n" + " ".join(words[i : i + 8]) + "\n" for i in range(0, count, 8)]
    return _ZipfWords(lines, names[0], names[1])


PuzzleMaker = Callable[[np.random.Generator, Haystack, int], Puzzle]
"""``make(random, haystack, length)`` makes a puzzle for a text of ``length`` tokens."""

TASKS: dict[str, PuzzleMaker] = {
    "multi_query": multi_query,
    "multi_key": multi_key,
    "variable_tracking": variable_tracking,
    "frequent_words": frequent_words,
}
"""Tasks of RULER's kind by name. Their order is part of what seeds their examples."""

EARLIER_NAMES = {
    "several": "multi_query",
    "crowd": "multi_key",
    "chain": "variable_tracking",
    "frequent": "frequent_words",
}
"""What the tasks were called before they had RULER's names."""


def choose_tasks(names: list[str] | None) -> list[str]:
    """Return tasks by their names, or by those that they had earlier; all of them for None.

    Raises:
        UserError: if there is no such task.
    """
    if names is None:
        return list(TASKS)
    tasks = [EARLIER_NAMES.get(name, name) for name in names]
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks: {task} is not a task; known: {', '.join(TASKS)}")
    return tasks


def _fitting(haystack: Haystack, length: int, fact: str, reserved: str) -> int:
    """Return how many facts fill about nine tenths of a text, besides what is ``reserved``.

    Args:
        haystack: whose tokenizer counts.
        length: tokens of the text.
        fact: with ``{}`` in the place of a name.
        reserved: other text of the example.
    """
    encode = haystack.tokenizer.encode
    tried = 64
    facts = "".join(fact.format(name) for name in _names(np.random.default_rng(0), tried))
    available = max(0, length - 16 - len(encode(reserved.encode())))
    return available * tried * 9 // 10 // len(encode(facts.encode()))


def _stem(name: str) -> str:
    """Return a question, which begins a line, so that its tokens are the same as in a fact."""
    return f"\nThe number of {name} is"


def _sentence(name: str, value: str) -> str:
    return f"{_stem(name)} {value}.\n"


def _names(random: np.random.Generator, count: int) -> list[str]:
    """Draw different words of three syllables, or four if there are very many."""
    num_syllables = 3 if count < 10_000 else 4
    names: dict[str, None] = {}  # a set that keeps its order
    while len(names) < count:
        words = random.integers(len(_SYLLABLES), size=(count, num_syllables))
        names |= dict.fromkeys("".join(_SYLLABLES[i] for i in word) for word in words)
    return list(names)[:count]


def _numbers(random: np.random.Generator, count: int) -> list[str]:
    """Draw numbers of five digits, all different as long as there are enough."""
    drawn = random.choice(90_000, count, replace=count > 90_000)
    return [str(10_000 + number) for number in drawn]
