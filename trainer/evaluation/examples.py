"""Puzzles laid out in long texts: the examples that a model is asked.

All examples are a pure function of the seed and what else is asked for.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..data.samples import seeded_generator
from ..errors import UserError
from .held_out import Haystack
from .tasks import TASKS, Puzzle, needle

# Streams of random numbers: the seeds of each begin with its number.
_NEEDLE_STREAM = 11
_TASK_STREAM = 12


class AnsweredText(NamedTuple):
    """A text with questions and answers at its end."""

    tokens: list[int]
    answers: list[range]
    """Positions of the tokens of each answer."""


class Example(NamedTuple):
    """A text with right answers, and for each question the same with a wrong one."""

    right: AnsweredText
    wrong: list[AnsweredText]
    """For each question, the text up to it, with right answers to earlier ones and a wrong one to
    this.
    """


def needle_examples(
    haystack: Haystack, count: int, seed: int, length: int, depth: float
) -> Iterator[Example]:
    """Make examples of a number in a text, the same numbers and texts at every ``depth``."""
    for number in range(count):
        random = seeded_generator(_NEEDLE_STREAM, seed, length, number)
        yield lay_out(needle(random, depth), haystack, length, random)


def task_examples(
    haystack: Haystack, count: int, seed: int, task: str, length: int
) -> Iterator[Example]:
    """Make examples of a task by its name in :data:`~.tasks.TASKS`."""
    task_number = list(TASKS).index(task)
    for number in range(count):
        random = seeded_generator(_TASK_STREAM, seed, length, task_number, number)
        yield lay_out(TASKS[task](random, haystack, length), haystack, length, random)


def lay_out(
    puzzle: Puzzle, haystack: Haystack, length: int, random: np.random.Generator
) -> Example:
    """Hide a puzzle in a text of the haystack: ``length`` tokens, to the end of the right answers.

    Raises:
        UserError: if it does not fit.
    """
    encode = haystack.tokenizer.encode
    facts = [(fact.depth, encode(fact.text.encode())) for fact in puzzle.facts]
    solved_example = encode(puzzle.solved_example.encode())
    questions = _ask(puzzle, haystack)

    hay_tokens = length - len(solved_example) - len(questions.right.tokens)
    hay_tokens -= sum(len(ids) for _, ids in facts)
    if hay_tokens < 0:
        raise UserError(
            f"--lengths: a question and what it asks for take {length - hay_tokens:,} tokens; "
            "use at least 64 more"
        )

    hay = haystack.text(hay_tokens, random)
    text = solved_example
    hay_used = 0
    for depth, ids in sorted(facts, key=lambda fact: fact[0]):
        place = round(depth * hay_tokens)
        text = text + hay[hay_used:place] + ids
        hay_used = place
    text = text + hay[hay_used:]
    return Example(
        _append(text, questions.right), [_append(text, wrong) for wrong in questions.wrong]
    )


def _ask(puzzle: Puzzle, haystack: Haystack) -> Example:
    """Return all questions of a puzzle with their answers, without the text before them."""
    tokens: list[int] = []  # questions so far, with right answers
    answers: list[range] = []
    wrong = []
    for question in puzzle.questions:
        wrong_tokens, wrong_answer = _answer(tokens, question.stem, question.wrong, haystack)
        wrong.append(AnsweredText(wrong_tokens, [wrong_answer]))
        tokens, answer = _answer(tokens, question.stem, question.right, haystack)
        answers.append(answer)
    return Example(AnsweredText(tokens, answers), wrong)


def _answer(
    before: list[int], stem: str, answer: str, haystack: Haystack
) -> tuple[list[int], range]:
    """Append a question and its answer. Returns all tokens, and the positions of the answer's.

    A tokenizer may join the end of the stem and the beginning of the answer; the answer begins at
    the first token that differs from those of the stem alone.
    """
    stem_tokens = haystack.tokenizer.encode(stem.encode())
    tokens = haystack.tokenizer.encode(f"{stem} {answer}".encode())
    shared = 0
    for stem_token, token in zip(stem_tokens, tokens, strict=False):
        if stem_token != token:
            break
        shared += 1
    return before + tokens, range(len(before) + shared, len(before) + len(tokens))


def _append(text: list[int], questions: AnsweredText) -> AnsweredText:
    shift = len(text)
    answers = [range(answer.start + shift, answer.stop + shift) for answer in questions.answers]
    return AnsweredText(text + questions.tokens, answers)
