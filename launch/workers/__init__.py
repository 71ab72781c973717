"""Processes that commands start: ``python -m longspan.launch.workers.NAME ARGUMENTS``."""
