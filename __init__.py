"""longspan pretrains language models on very long sequences: hybrid full, sparse and linear attention."""

__version__ = "0.1.0"
