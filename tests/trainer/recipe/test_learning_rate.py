from itertools import pairwise

import pytest
from longspan.trainer.recipe.learning_rate import learning_rate
from longspan.trainer.recipe.schema import LRSchedulerConfig


def rates(steps, **schedule):
    return [learning_rate(step, steps, 2.0, LRSchedulerConfig(**schedule)) for step in range(steps)]


def test_cosine():
    lrs = rates(110, name="cosine", warmup_steps=10, min_lr_factor=0.1)
    assert lrs[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert lrs[59] == pytest.approx(0.2 + 1.8 * 0.5)
    assert lrs[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(lrs[10:]))


def test_wsd():
    lrs = rates(100, name="wsd", warmup_steps=4, decay_ratio=0.2, min_lr_factor=0.0)
    assert lrs[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert set(lrs[4:80]) == {2.0}
    assert lrs[89] == pytest.approx(1.0)
    assert lrs[-1] == 0.0


def test_a_run_shorter_than_its_warmup():
    assert rates(3, name="wsd", warmup_steps=10) == pytest.approx([0.2, 0.4, 0.6])
