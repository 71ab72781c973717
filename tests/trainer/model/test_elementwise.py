"""Kernels of a few operations for each number, without a GPU: interpreted, and compiled."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from ...attention.softmax.test_triton import SHARED, python

WORKER = Path(__file__).with_name("elementwise_worker.py")


def test_parity_in_the_interpreter():
    python(WORKER, "interpret")


@pytest.mark.parametrize(
    "arch", [90, *(pytest.param(arch, marks=pytest.mark.wide) for arch in SHARED if arch != 90)]
)
def test_compiled_ahead_of_time(arch):
    """All in registers: nothing is spilled, and little is passed between threads."""
    kernels = [json.loads(line) for line in python(WORKER, "compile", arch).splitlines()]
    assert len(kernels) == 8
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["shared"] <= 2048, kernel
