"""Ask a model questions about long texts, and count how it answers."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from ..engines.engine import Engine
from .examples import AnsweredText, Example

_TOKENS_AT_ONCE = 2**14


class RetrievalScore(NamedTuple):
    """How a model answers all questions of some examples. The fields are keys of reports."""

    exact: float
    """Share of the questions that greedy decoding answers, after right answers to earlier ones."""
    exact_error: float
    """Standard error of that over examples; 0 for a single one."""
    preferred: float
    """Share of the questions whose right answer is likelier than the wrong one. It is one half for
    a model that cannot tell them apart.
    """
    preferred_error: float
    """Standard error of that over examples."""
    loss: float
    """Of the tokens of right answers, in nats per token."""


class _ExampleScore(NamedTuple):
    """Means over the questions of an example."""

    exact: float
    preferred: float
    loss: float


class _AnswerScore(NamedTuple):
    loss: float
    """Sum over the tokens of the answer, in nats."""
    num_tokens: int
    is_exact: bool
    """Whether every token is the likeliest one."""


def ignore_progress(done: int) -> None:
    """Show no progress: the default ``advance`` of an evaluation."""


def batch_slices(count: int, length: int) -> Iterator[slice]:
    """Split ``count`` sequences of ``length`` tokens into batches for one forward pass each.

    A batch has at most 16,384 tokens, which bounds its memory, or a single longer sequence.
    """
    batch_size = max(1, _TOKENS_AT_ONCE // length)
    for start in range(0, count, batch_size):
        yield slice(start, start + batch_size)


def score_examples(
    engine: Engine,
    examples: Iterable[Example],
    length: int,
    advance: Callable[[int], None] = ignore_progress,
) -> RetrievalScore:
    """Ask a model the questions of ``examples``, which have ``length`` tokens each.

    ``advance`` is called with the number of examples that are done.
    """
    scores = []
    for example in examples:
        scores.append(_score_example(engine, example, length))
        advance(1)
    results = np.array(scores)  # [examples, 3]: exact, preferred, loss

    exact, preferred, loss = results.mean(0).tolist()
    exact_error = 0.0
    preferred_error = 0.0
    if len(results) > 1:
        errors = results.std(0, ddof=1) / math.sqrt(len(results))
        exact_error, preferred_error, _ = errors.tolist()
    return RetrievalScore(exact, exact_error, preferred, preferred_error, loss)


def _score_example(engine: Engine, example: Example, length: int) -> _ExampleScore:
    texts = [example.right, *example.wrong]
    scores: list[_AnswerScore] = []
    for batch in batch_slices(len(texts), length):
        scores += _score_answers(engine, texts[batch])
    num_questions = len(example.wrong)
    right = scores[:num_questions]
    wrong = scores[num_questions:]

    exact = [score.is_exact for score in right]
    # 1 if the right answer is likelier, 0 if the wrong one is, 1/2 if both are equally likely.
    preferred = [
        0.5 + 0.5 * np.sign(wrong_score.loss - right_score.loss)
        for right_score, wrong_score in zip(right, wrong, strict=True)
    ]
    losses = [score.loss / score.num_tokens for score in right]
    return _ExampleScore(float(np.mean(exact)), float(np.mean(preferred)), float(np.mean(losses)))


def _score_answers(engine: Engine, texts: list[AnsweredText]) -> list[_AnswerScore]:
    """Score all answers of all texts, one after another, in one forward pass."""
    longest = max(len(text.tokens) for text in texts)
    padded = np.zeros((len(texts), longest), np.int64)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text.tokens)] = text.tokens
    tokens = torch.from_numpy(padded).to(engine.device)  # [texts, time]

    losses, is_likeliest = engine.token_losses(tokens[:, :-1], tokens[:, 1:])
    losses = losses.cpu()  # [texts, time - 1]
    is_likeliest = is_likeliest.cpu()

    scores = []
    for number, text in enumerate(texts):
        for answer in text.answers:
            labels = slice(answer.start - 1, answer.stop - 1)  # label i is token i + 1
            loss = float(losses[number, labels].double().sum())
            is_exact = bool(is_likeliest[number, labels].all())
            scores.append(_AnswerScore(loss, len(answer), is_exact))
    return scores
