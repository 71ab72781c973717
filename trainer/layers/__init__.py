"""The kinds of layer.

Each kind is one class, a block, that owns all that is known about it: parameters, costs, problems
in a recipe, what a token sees, how its module is built and how it leaves for Hugging Face. The
modules that compute blocks stand beside them (``*_mixer.py``); only these import torch.
"""
