"""Recipes: their schema, their checks and their files. Nothing here imports torch."""
