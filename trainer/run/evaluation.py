"""Evaluation between steps, and the batches that all ranks step through together."""

import math
from collections.abc import Iterable, Iterator

from ..data.batches import Microbatch
from ..engines.engine import Engine
from ..ranks import RankGroup


def evaluate(
    engine: Engine, batches: Iterable[Microbatch], bytes_per_token: float | None
) -> dict[str, float]:
    """Return ``eval/loss`` and, if the bytes per token are known, ``eval/bits_per_byte``.

    Every rank calls it, with equally many held-out batches.
    """
    loss_sum = 0.0
    tokens = 0
    for batch in batches:
        batch_loss_sum, batch_tokens = engine.evaluate(batch)
        loss_sum += batch_loss_sum
        tokens += batch_tokens

    loss = loss_sum / max(1, tokens)
    metrics = {"eval/loss": loss}
    bits = bits_per_byte(loss, bytes_per_token)
    if bits is not None:
        metrics["eval/bits_per_byte"] = bits
    return metrics


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """Convert a loss in nats per token to bits per byte of text; None if the tokens are no text."""
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None


def agreed_batches(ranks: RankGroup, batches: Iterator[Microbatch]) -> Iterator[Microbatch]:
    """Yield the batches, of which every rank has equally many.

    Bad data on one rank stops all ranks at the same batch.
    """
    while True:
        with ranks.raise_on_all():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
