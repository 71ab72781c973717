"""Linear attention and short convolutions on one device: one operation, one module for each backend."""
