"""How much of the recall task a trained model can do: ``RUN/eval/mqar.json``."""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch

from ..checkpoint.run_folder import RunFolder
from ..data.mqar import EVALUATION_STREAM, make_examples
from ..data.samples import seeded_generator
from ..engines.engine import Engine
from ..progress import track
from ..recipe.schema import MQARConfig
from .mqar_settings import RecallSetting, recall_task, trained_settings
from .scoring import batch_slices, ignore_progress


def accuracy(
    engine: Engine,
    task: MQARConfig,
    setting: RecallSetting,
    count: int,
    seed: int,
    advance: Callable[[int], None] = ignore_progress,
) -> float:
    """Return the mean, over examples, of the share of questions that the likeliest token answers.

    The likeliest token is chosen from the whole vocabulary. The examples are a pure function of the
    ``seed`` and the setting, and no model was trained on them.

    Args:
        engine: with the trained model.
        task: that the model was trained on.
        setting: of the examples.
        count: number of examples.
        seed: of the examples.
        advance: called with the number of examples that are done.
    """
    generator = seeded_generator(EVALUATION_STREAM, seed, setting.length, setting.pairs)
    examples = make_examples(task, count, setting.length, setting.pairs, generator)

    shares = []  # of right answers, for each example
    for batch in batch_slices(count, setting.length):
        tokens = torch.from_numpy(examples.tokens[batch]).to(engine.device)  # [batch, length]
        answers = torch.from_numpy(examples.answers[batch]).to(engine.device)  # [batch, pairs]
        positions = torch.from_numpy(examples.query_positions[batch]).to(engine.device)

        labels = torch.zeros_like(tokens).scatter(1, positions, answers)
        _, is_likeliest = engine.token_losses(tokens, labels)
        shares.append(is_likeliest.gather(1, positions).double().mean(1).cpu().numpy())
        advance(len(tokens))
    return float(np.concatenate(shares).mean())


def evaluate_mqar(
    folder: RunFolder, engine: Engine, settings: list[RecallSetting], count: int, seed: int
) -> dict:
    """Measure the accuracy in each setting, and write the report to ``RUN/eval/mqar.json``.

    Args:
        folder: of the run.
        engine: with its trained model.
        settings: to measure.
        count: examples of each setting.
        seed: of the examples.

    Returns:
        the report: the accuracies, with all that they depend on.
    """
    task = recall_task(folder.recipe)
    trained = trained_settings(folder.recipe)
    results = []
    with track("asking", len(settings) * count, of_bytes=False) as advance:
        for setting in settings:
            reached = accuracy(engine, task, setting, count, seed, advance)
            results.append({**asdict(setting), "trained": setting in trained, "accuracy": reached})
    report = {
        "examples": count,
        "seed": seed,
        "vocab_size": task.vocab_size,
        "chance": 1 / task.values,
        "settings": results,
    }
    folder.write_evaluation("mqar", report)
    return report
