"""Softmax attention under a pattern on one device: one module for each backend."""
