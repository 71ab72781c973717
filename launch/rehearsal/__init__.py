"""A rehearsal: the whole training step of a recipe on a GPU and ranks that are not there."""
