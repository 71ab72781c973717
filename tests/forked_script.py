"""Run SCRIPT as ``python SCRIPT ARGUMENTS`` would, in a process that already has its imports.

The fixture ``ranks`` in conftest.py sets the global ``JOB``.
"""

import os
import runpy
import sys

import torch

job: dict = globals()["JOB"]  # script, arguments, environment, and pipes for stdout and stderr
os.environ.update(job["environment"])
for descriptor, pipe in enumerate(job["streams"], start=1):
    os.dup2(os.open(pipe, os.O_WRONLY), descriptor)
torch.set_num_threads(int(job["environment"]["OMP_NUM_THREADS"]))
sys.argv = [job["script"], *job["arguments"]]
runpy.run_path(job["script"], run_name="__main__")
