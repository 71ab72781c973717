"""Checkpoints and the folder of a run, on disk."""
