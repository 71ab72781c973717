"""Training: recipes, the kinds of layer, model, data, engines and the loop.

``hybrid_stack_spec`` brings the layers into a Megatron-core model of your own, ``load_recipe``
reads a recipe, and every kind of layer is a class: ``from longspan.trainer import FullBlock,
hybrid_stack_spec, load_recipe``. Nothing is imported before it is used.
"""

__all__ = [
    "BasedBlock",
    "Block",
    "ConvolutionBlock",
    "DeltaNetBlock",
    "FullBlock",
    "GLABlock",
    "GatedDeltaNetBlock",
    "HedgehogBlock",
    "KDABlock",
    "LightningBlock",
    "LinearBlock",
    "Mamba2Block",
    "MoBABlock",
    "PatternBlock",
    "RetentionBlock",
    "S2Block",
    "SimpleGLABlock",
    "StreamingBlock",
    "WindowBlock",
    "hybrid_stack_spec",
    "load_recipe",
]


def __getattr__(name: str):
    if name == "load_recipe":
        from .recipe.file import load_recipe

        return load_recipe
    if name == "hybrid_stack_spec":
        from .model.layer import hybrid_stack_spec

        return hybrid_stack_spec
    if name in __all__:
        from .layers import registry

        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
