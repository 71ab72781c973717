"""Weights to begin with: those of a Hugging Face folder, for a recipe that has its layers or changed some of them."""

import json
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from .data.tokenizer import recipe_vocab_size
from .errors import UserError
from .export.native import NATIVES, Native, Source
from .export.target import Custom
from .linear_blocks import LightningBlock
from .recipe import Initial, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .control import Control
    from .engine import Engine

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)


def require_initial(recipe: Recipe) -> None:
    """Refuse a folder that the recipe cannot begin with, before any process starts.

    Raises:
        UserError: it is no model of an architecture that is known here, its sizes are others, or parameters are on one side
            alone that ``initial`` does not name; one line for each.
    """
    if recipe.initial:
        native, config = _native(recipe)
        problems = [*_sizes(native, config), *_one_sided(native, recipe.initial, _names(recipe.initial.path, native))]
        if problems:
            raise UserError("\n".join(problems))


def load_initial(engine: "Engine", recipe: Recipe, control: "Control") -> None:
    """Take the weights of ``recipe.initial``, which the first rank reads and hands on layer by layer; every rank calls it.

    Raises:
        UserError: a tensor has another shape, or the folder's fixed decays are others than the recipe's.
    """
    import torch.distributed as dist

    from .export.rows import by_layer

    native, _ = _native(recipe)
    theirs: dict[str, Tensor] = {}
    with control.together():
        if dist.get_rank() == 0:
            theirs = _weights(recipe.initial.path, native)
    parts = control.gather({name: shards.shape for name, shards in engine.state().items() if name.startswith("model.")})
    shapes = {name.removeprefix("model."): shape for part in parts for name, shape in part.items()}
    for layer in by_layer(native.rows()):
        whole: dict[str, Tensor] = {}
        with control.together():
            if dist.get_rank() == 0:
                try:
                    whole = {rows.ours: rows.join(rows.own(theirs), shapes[rows.ours]) for rows in layer}
                except ValueError as error:
                    raise UserError(f"initial: {recipe.initial.path}: {error}") from None
        engine.load_weights({rows.ours: control.same_tensor(whole.get(rows.ours), shapes[rows.ours]) for rows in layer})


def _native(recipe: Recipe) -> tuple[Native, dict]:
    """The folder's architecture, with the recipe's model in it, and the folder's config."""
    path = Path(recipe.initial.path)
    try:
        config = json.loads((path / "config.json").read_text())
        kind = config["model_type"]
    except OSError as error:
        raise UserError(f"initial: {path}/config.json: {error.strerror}; name the folder of a Hugging Face model") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"initial: {path}/config.json: is not the config of a Hugging Face model") from None
    known = {native.model_type: native for native in NATIVES}
    if kind not in known:
        raise UserError(f"initial: {path} is of architecture {kind}; known are {', '.join(known)}")
    return known[kind](Source(recipe.model, recipe_vocab_size(recipe), recipe.training.seq_length)), config


def _sizes(native: Native, config: dict) -> Iterator[str]:
    ours = Native.config(native)
    for key in _SIZES:
        if config.get(key) is not None and config[key] != ours[key]:
            yield f"initial: {key}: is {config[key]} in the folder's config.json, {ours[key]} in the recipe's model"


def _one_sided(native: Native, initial: Initial, names: set[str]) -> Iterator[str]:
    rows = list(native.rows())
    new = sorted({rows.ours for rows in Custom(native.source).rows()} - {each.ours for each in rows})
    used = {name for each in rows for name in each.theirs}
    unused = sorted(name for name in names - used if not native.idle(name))
    missing = sorted(used - names)
    for key, found, what in (
        ("new", new, "the folder's model has no"),
        ("unused", unused, "the recipe's model has no place for"),
    ):
        allowed = getattr(initial, key)
        if unknown := [name for name in found if not any(fnmatchcase(name, pattern) for pattern in allowed)]:
            yield f"initial: {what} {_some(unknown)}; if that is meant, name them in initial.{key}"
        for pattern in allowed:
            if not any(fnmatchcase(name, pattern) for name in found):
                yield f"initial.{key}: {pattern} names nothing of {len(found)} such parameters; remove it"
    if missing:
        yield f"initial: {_some(missing)}: not in the folder's model"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _names(path: str, native: Native) -> set[str]:
    """Of the folder's parameters, as they are in memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    except (OSError, ValueError) as error:
        raise UserError(f"initial: {path}: transformers cannot load it: {str(error).splitlines()[0]}") from None
    return {name for name, _ in _parameters(built, native)}


def _parameters(built: "nn.Module", native: Native) -> "Iterable[tuple[str, Tensor]]":
    """Where output and input embedding are one, under both names, unless ours are one as well."""
    found = dict(built.named_parameters(remove_duplicate=False))
    if native.model.tie_word_embeddings and built.config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found.items()


def _weights(path: str, native: Native) -> "dict[str, Tensor]":
    from transformers import AutoModelForCausalLM

    from .export.folder import quiet

    quiet()
    try:
        built = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    except (OSError, ValueError) as error:
        raise UserError(f"initial: {path}: transformers cannot load it: {str(error).splitlines()[0]}") from None
    _require_same_decays(built, native, path)
    return {name: parameter.detach() for name, parameter in _parameters(built, native)}


def _require_same_decays(built: "nn.Module", native: Native, path: str) -> None:
    from .mixers.decay import FIXED

    for number, (block, layer) in enumerate(zip(native.stack, built.model.layers, strict=True)):
        slopes = getattr(getattr(layer, "self_attn", None), "slope_rate", None)
        if isinstance(block, LightningBlock) and slopes is not None:
            ours = -FIXED[block.decay](slopes.numel(), number, len(native.stack))
            if not ours.allclose(slopes.float().flatten(), atol=1e-6):
                raise UserError(f"initial: {path}: the decays of layer {number} are not those of decay: {block.decay}")
