"""longspan pretrains language models with full, sparse and linear attention on long sequences."""

__version__ = "0.1.0"
