"""How often a model finds what a long text says: a needle by its depth, and the tasks of :mod:`.tasks`."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from ..data.mqar import stream
from ..engine import Engine
from .held_out import Haystack
from .tasks import TASKS, Asked, Example, lay_out, needle

_TOKENS = 2**14  # in one forward pass, if an example is not longer
_NEEDLE, _TASK = 11, 12  # streams of random numbers


class Found(NamedTuple):
    """Over all questions of some examples."""

    exact: float
    """Share of the questions that greedy decoding answers, each after right answers to those before it."""
    preferred: float
    """Share whose right answer is likelier than the wrong one; a model that has not read the text has a half."""
    loss: float
    """Of a right answer's tokens, in nats a token."""


def needles(haystack: Haystack, count: int, seed: int, length: int, depth: float) -> Iterator[Example]:
    """Of the same numbers in the same texts at every depth. A pure function of its arguments, as the next."""
    for number in range(count):
        random = stream(_NEEDLE, seed, length, number)
        yield lay_out(needle(random, depth), haystack, length, random)


def examples(haystack: Haystack, count: int, seed: int, task: str, length: int) -> Iterator[Example]:
    """Of one of :data:`~.tasks.TASKS`."""
    for number in range(count):
        random = stream(_TASK, seed, length, list(TASKS).index(task), number)
        yield lay_out(TASKS[task](random, haystack, length), haystack, length, random)


def measure(engine: Engine, made: Iterator[Example], length: int, advance: Callable[[int], None] = lambda done: None) -> Found:
    """What the model finds in examples of ``length`` tokens."""
    answers: list[tuple[float, bool, bool]] = []
    batch: list[Example] = []

    def ask() -> None:
        right = _answer(engine, [example.right for example in batch])
        wrong = _answer(engine, [example.wrong for example in batch])
        for (loss, exact), (other, _) in zip(right, wrong, strict=True):
            answers.append((loss, loss < other, exact))
        advance(len(batch))
        batch.clear()

    for example in made:
        batch.append(example)
        if len(batch) * length >= _TOKENS:
            ask()
    if batch:
        ask()
    loss, preferred, exact = np.mean(answers, axis=0).tolist()
    return Found(exact, preferred, loss)


def _answer(engine: Engine, asked: list[Asked]) -> Iterator[tuple[float, bool]]:
    """(loss of a token in the mean, whether all are the likeliest) of every answer."""
    ids = np.zeros((len(asked), max(len(each.tokens) for each in asked)), np.int64)
    for row, each in zip(ids, asked, strict=True):
        row[: len(each.tokens)] = each.tokens
    tokens = torch.from_numpy(ids).to(engine.device)
    losses, likeliest = (each.cpu() for each in engine.token_losses(tokens[:, :-1], tokens[:, 1:]))
    for row, each in enumerate(asked):
        for answer in each.answers:
            where = row, slice(answer.start - 1, answer.stop - 1)
            yield float(losses[where].double().mean()), bool(likeliest[where].all())
