"""What the benchmarks of ``longspan bench`` measure, and how."""
