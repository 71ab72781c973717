"""How much of the recall task a trained model can do: ``RUN/eval/mqar.json``."""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch

from ..checkpoint.run_folder import RunFolder
from ..data.mqar import EVALUATION, examples, stream
from ..engines.engine import Engine
from ..progress import track
from ..recipe.schema import MQARConfig
from .at_once import sequences_at_once
from .mqar_settings import Setting, trained_settings


def accuracy(
    engine: Engine,
    task: MQARConfig,
    setting: Setting,
    count: int,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
) -> float:
    """Mean over ``count`` examples of the share of their questions that the likeliest token answers.

    The examples are a pure function of the ``seed`` and the setting, and no model was trained on them. All answers of the
    whole vocabulary are possible ones.
    """
    random = stream(EVALUATION, seed, setting.length, setting.pairs)
    made = examples(task, count, setting.length, setting.pairs, random)
    right, size = [], sequences_at_once(setting.length)
    for first in range(0, count, size):
        tokens, asked, answers = (
            torch.from_numpy(part[first : first + size]).to(engine.device) for part in made
        )
        _, likeliest = engine.token_losses(
            tokens, torch.zeros_like(tokens).scatter(1, asked, answers)
        )
        right.append(likeliest.gather(1, asked).double().mean(1).cpu().numpy())
        advance(len(tokens))
    return float(np.concatenate(right).mean())


def evaluate_mqar(
    folder: RunFolder, engine: Engine, settings: list[Setting], count: int, seed: int
) -> dict:
    """The accuracy in each setting, with what it depends on; also written to ``RUN/eval/mqar.json``."""
    recipe, task = folder.recipe, folder.recipe.data.mqar
    trained, rows = trained_settings(recipe), []
    with track("asking", len(settings) * count, of_bytes=False) as advance:
        for setting in settings:
            reached = accuracy(engine, task, setting, count, seed, advance)
            rows.append({**asdict(setting), "trained": setting in trained, "accuracy": reached})
    report = {
        "examples": count,
        "seed": seed,
        "vocab_size": task.vocab_size,
        "chance": 1 / task.values,
        "settings": rows,
    }
    folder.write_evaluation("mqar", report)
    return report
