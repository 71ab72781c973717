"""The kinds of layer that a recipe may name."""
