"""Runs SCRIPT as ``python SCRIPT ARGUMENTS`` would, in a process that has its imports already: see ``ranks`` in conftest.py."""

import os
import runpy
import sys

import torch

given: dict = globals()["GIVEN"]  # script, arguments, environment, and pipes for stdout and stderr
os.environ.update(given["environment"])
for descriptor, file in enumerate(given["streams"], start=1):
    os.dup2(os.open(file, os.O_WRONLY), descriptor)
torch.set_num_threads(int(given["environment"]["OMP_NUM_THREADS"]))
sys.argv = [given["script"], *given["arguments"]]
runpy.run_path(given["script"], run_name="__main__")
