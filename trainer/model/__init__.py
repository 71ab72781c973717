"""The model: a Megatron-core model whose layers are ours."""
