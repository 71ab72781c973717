"""Build the engine that a recipe names."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..data.tokenizer import recipe_vocab_size
from ..recipe.schema import Recipe
from ..versions import require_supported
from .engine import Engine

if TYPE_CHECKING:
    from .base import EngineBase


def _megatron() -> "type[EngineBase]":
    from .megatron import MegatronEngine

    return MegatronEngine


def _deepspeed() -> "type[EngineBase]":
    require_supported("deepspeed")
    from .deepspeed import DeepSpeedEngine

    return DeepSpeedEngine


ENGINES: "dict[str, Callable[[], type[EngineBase]]]" = {
    "megatron": _megatron,
    "deepspeed": _deepspeed,
}
"""The class of every engine by its name in a recipe (``engine.name``), imported when called."""


def build_engine(recipe: Recipe, vocab_size: int | None = None) -> Engine:
    """Build the recipe's model on its engine, ready to train.

    Needs the default process group; every rank calls it.

    Args:
        vocab_size: number of token ids before padding; None to derive it from the recipe, which
            reads the tokenizer.
    """
    if vocab_size is None:
        vocab_size = recipe_vocab_size(recipe)
    engine_class = ENGINES[recipe.engine.name]()
    return engine_class(recipe, vocab_size)
