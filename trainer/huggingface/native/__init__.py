"""The architectures of ``transformers`` that a recipe's model may be exactly.

Each is one class: what it requires of the layers, its config, and where its tensors lie in the
parameters. Facts of transformers 5.23.
"""
