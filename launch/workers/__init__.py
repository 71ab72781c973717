"""Processes that commands start, each a module: ``python -m longspan.launch.workers.NAME ARGUMENTS``."""
