"""Recipes, data, model, engines and the training loop."""
