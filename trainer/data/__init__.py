"""From text to batches: tokenizers, Megatron's .bin/.idx corpora, packing and mixtures."""
