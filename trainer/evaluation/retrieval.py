"""How often a model finds what a long text says: a needle by its depth, and the tasks of :mod:`.tasks`."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from ..data.mqar import stream
from ..engines.engine import Engine
from .at_once import sequences_at_once
from .held_out import Haystack
from .tasks import TASKS, Asked, Example, lay_out, needle

_NEEDLE, _TASK = 11, 12  # streams of random numbers


class Found(NamedTuple):
    """Over all questions of some examples."""

    exact: float
    """Share of the questions that greedy decoding answers, each after right answers to those before it."""
    exact_error: float
    """Standard error, over examples; 0 for one."""
    preferred: float
    """Share whose right answer is likelier than the wrong one: a half for a model that cannot tell them apart."""
    preferred_error: float
    loss: float
    """Of a right answer's tokens, in nats a token."""


def needles(
    haystack: Haystack, count: int, seed: int, length: int, depth: float
) -> Iterator[Example]:
    """Of the same numbers in the same texts at every depth. A pure function of its arguments, as the next."""
    for number in range(count):
        random = stream(_NEEDLE, seed, length, number)
        yield lay_out(needle(random, depth), haystack, length, random)


def examples(
    haystack: Haystack, count: int, seed: int, task: str, length: int
) -> Iterator[Example]:
    """Of one of :data:`~.tasks.TASKS`."""
    for number in range(count):
        random = stream(_TASK, seed, length, list(TASKS).index(task), number)
        yield lay_out(TASKS[task](random, haystack, length), haystack, length, random)


def measure(
    engine: Engine,
    made: Iterator[Example],
    length: int,
    advance: Callable[[int], None] = lambda done: None,
) -> Found:
    """What the model finds in examples of ``length`` tokens."""
    rows, size = [], sequences_at_once(length)  # of each example: exact, preferred, loss
    for example in made:
        texts = [example.right, *example.wrong]
        answers = [
            answer
            for first in range(0, len(texts), size)
            for answer in _answers(engine, texts[first : first + size])
        ]
        count = len(example.wrong)
        right, wrong = answers[:count], answers[count:]
        preferred = [
            0.5 + 0.5 * np.sign(other.loss - own.loss)
            for own, other in zip(right, wrong, strict=True)
        ]
        losses = [answer.loss / answer.tokens for answer in right]
        rows.append(
            [np.mean([answer.exact for answer in right]), np.mean(preferred), np.mean(losses)]
        )
        advance(1)
    found = np.array(rows)
    means = found.mean(0).tolist()
    errors = (
        (found.std(0, ddof=1) / math.sqrt(len(found))).tolist() if len(found) > 1 else [0.0] * 3
    )
    return Found(means[0], errors[0], means[1], errors[1], means[2])


class _Answer(NamedTuple):
    loss: float
    """Of all its tokens together."""
    tokens: int
    exact: bool
    """Whether all its tokens are the likeliest."""


def _answers(engine: Engine, asked: list[Asked]) -> Iterator[_Answer]:
    """Of all texts, one after another."""
    ids = np.zeros((len(asked), max(len(each.tokens) for each in asked)), np.int64)
    for row, each in zip(ids, asked, strict=True):
        row[: len(each.tokens)] = each.tokens
    tokens = torch.from_numpy(ids).to(engine.device)
    losses, likeliest = (each.cpu() for each in engine.token_losses(tokens[:, :-1], tokens[:, 1:]))
    for row, each in enumerate(asked):
        for answer in each.answers:
            where = row, slice(answer.start - 1, answer.stop - 1)
            yield _Answer(
                float(losses[where].double().sum()), len(answer), bool(likeliest[where].all())
            )
