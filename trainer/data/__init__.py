"""From text to batches: tokenizers, Megatron's .bin/.idx corpora, packing, mixtures."""
