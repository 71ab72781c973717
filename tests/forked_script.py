"""Run a script or a module as ``python`` would, in a process that already has its imports.

:func:`start_fork` in conftest.py sets the global ``JOB``.
"""

import gc
import os
import runpy
import sys

import torch

job: dict = globals()["JOB"]
gc.freeze()  # garbage collections leave the imported modules out
os.chdir(job["folder"])
os.environ.clear()
os.environ.update(job["environment"])
for descriptor, pipe in enumerate(job["streams"], start=1):
    os.dup2(os.open(pipe, os.O_WRONLY), descriptor)
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
sys.argv = [job["program"], *job["arguments"]]
if job["is_module"]:
    runpy.run_module(job["program"], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(job["program"], run_name="__main__")
