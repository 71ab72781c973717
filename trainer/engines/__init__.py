"""What trains the model: Megatron-core or DeepSpeed, behind one interface."""
