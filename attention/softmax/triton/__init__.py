"""The Triton kernels of softmax attention, and how they are launched."""
