"""The commands of ``longspan``, one a module."""
