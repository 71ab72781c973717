"""Weights to begin with: those of a Hugging Face folder, for a recipe that has its layers or changed some of them."""

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.tokenizer import recipe_vocab_size
from ..errors import UserError
from ..layers.linear import LightningBlock
from ..recipe.schema import InitialConfig, Recipe
from .folder import Loaded, listed, load_folder
from .native import NATIVES, ModelToExport, NativeTarget
from .target import CustomTarget

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

    from ..engines.engine import Engine
    from ..ranks import RankGroup


def require_initial(recipe: Recipe) -> None:
    """Refuse a folder that the recipe cannot begin with, before any process starts.

    Raises:
        UserError: it is no model of an architecture that is known here, its files are not those of its config, its sizes are
            others, it computes what no recipe says, or parameters are on one side alone that ``initial`` does not name; one
            line for each.
    """
    if recipe.initial:
        native, config = _native(recipe)
        loaded = _load(recipe)
        problems = [
            *_sizes(native, config),
            *_inexpressible(native, loaded.model.config),
            *_one_sided(
                native, recipe.initial, _parameters(loaded, native).keys() | loaded.unexpected
            ),
        ]
        if problems:
            raise UserError("\n".join(problems))


def load_initial(engine: "Engine", recipe: Recipe, ranks: "RankGroup") -> list[str]:
    """Take the weights of ``recipe.initial``, which the first rank reads and hands on layer by layer; every rank calls it.

    Returns:
        What is to be told of it, on the first rank.

    Raises:
        UserError: a tensor has another shape, or the folder's fixed decays are others than the recipe's.
    """
    import torch.distributed as dist

    from .tensor_map import by_layer

    native, _ = _native(recipe)
    theirs: dict[str, Tensor] = {}
    told: list[str] = []
    with ranks.raise_on_all():
        if dist.get_rank() == 0:
            loaded = _load(recipe)
            _require_same_decays(loaded.model, native, recipe.initial.path)
            theirs = {
                name: parameter.detach() for name, parameter in _parameters(loaded, native).items()
            }
            told = [
                f"begins with the weights of {recipe.initial.path}",
                *_differences(native, loaded.model.config),
            ]
    parts = ranks.gather(
        {name: shards.shape for name, shards in engine.state().items() if name.startswith("model.")}
    )
    shapes = {name.removeprefix("model."): shape for part in parts for name, shape in part.items()}
    for layer in by_layer(native.rows()):
        whole: dict[str, Tensor] = {}
        with ranks.raise_on_all():
            if dist.get_rank() == 0:
                try:
                    whole = {
                        rows.ours: rows.join(rows.own(theirs), shapes[rows.ours]) for rows in layer
                    }
                except ValueError as error:
                    raise UserError(f"initial: {recipe.initial.path}: {error}") from None
        engine.load_weights(
            {
                rows.ours: ranks.broadcast_tensor(whole.get(rows.ours), shapes[rows.ours])
                for rows in layer
            }
        )
    return told


def _native(recipe: Recipe) -> tuple[NativeTarget, dict]:
    """The folder's architecture, with the recipe's model in it, and the folder's config."""
    path = Path(recipe.initial.path)
    try:
        config = json.loads((path / "config.json").read_text())
        kind = config["model_type"]
    except OSError as error:
        raise UserError(
            f"initial: {path}/config.json: {error.strerror}; name the folder of a Hugging Face model"
        ) from None
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"initial: {path}/config.json: is not the config of a Hugging Face model"
        ) from None
    known = {native.model_type: native for native in NATIVES}
    if kind not in known:
        raise UserError(f"initial: {path} is of architecture {kind}; known are {', '.join(known)}")
    return known[kind](
        ModelToExport(recipe.model, recipe_vocab_size(recipe), recipe.training.seq_length)
    ), config


def _sizes(native: NativeTarget, config: dict) -> Iterator[str]:
    for key, ours in native.sizes().items():
        if config.get(key) is not None and config[key] != ours:
            yield f"initial: {key}: is {config[key]} in the folder's config.json, {ours} in the recipe's model"


def _inexpressible(native: NativeTarget, config: "PreTrainedConfig") -> Iterator[str]:
    fixed = {"rope_type": "default", "hidden_act": "silu", **native.fixed}
    theirs = {key: getattr(config, key, None) for key in fixed}
    theirs["rope_type"] = (config.rope_parameters or {}).get("rope_type", "default")
    for key, value in theirs.items():
        if value != fixed[key]:
            yield (
                f"initial: {key}: is {value} in the folder's config.json; the recipe's model has {fixed[key]}, and no key for "
                "another; begin with another folder"
            )


def _differences(native: NativeTarget, config: "PreTrainedConfig") -> Iterator[str]:
    """What the weights were trained with, where the recipe says otherwise."""
    model = native.model
    theirs = {
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": (config.rope_parameters or {}).get("rope_theta"),
    }
    found = {
        f"model.{key}": (getattr(model, key), value)
        for key, value in theirs.items()
        if value is not None
    }
    for layer, (name, block) in enumerate(zip(model.stack_names, model.stack, strict=True)):
        for key, value in native.block_keys(config, layer).items():
            found[f"model.layers.blocks.{name}.{key}"] = (getattr(block, key, value), value)
    for key, (ours, value) in found.items():
        if ours != value:
            yield f"{key}: {ours}, the weights were trained with {value}"


def _one_sided(native: NativeTarget, initial: InitialConfig, names: set[str]) -> Iterator[str]:
    rows = list(native.rows())
    new = sorted(
        {rows.ours for rows in CustomTarget(native.source).rows()} - {each.ours for each in rows}
    )
    used = {name for each in rows for name in each.theirs}
    unused = sorted(name for name in names - used if not native.idle(name))
    missing = sorted(used - names)
    for key, found, what in (
        ("new", new, "the folder's model has no"),
        ("unused", unused, "the recipe's model has no place for"),
    ):
        allowed = getattr(initial, key)
        if unknown := [
            name for name in found if not any(fnmatchcase(name, pattern) for pattern in allowed)
        ]:
            yield f"initial: {what} {listed(unknown)}; if that is meant, name them in initial.{key}"
        for pattern in allowed:
            if not any(fnmatchcase(name, pattern) for name in found):
                yield f"initial.{key}: {pattern} names nothing of {len(found)} such parameters; remove it"
    if missing:
        yield f"initial: {listed(missing)}: not in the folder's files"


def _load(recipe: Recipe) -> Loaded:
    return load_folder(recipe.initial.path, f"initial: {recipe.initial.path}", dtype="auto")


def _parameters(loaded: Loaded, native: NativeTarget) -> "dict[str, Tensor]":
    """Those that the folder's files give. Where output and input embedding are one, under both names, unless ours are one as
    well.
    """
    found = dict(loaded.model.named_parameters(remove_duplicate=False))
    if native.model.tie_word_embeddings and loaded.model.config.tie_word_embeddings:
        del found["lm_head.weight"]
    return {name: parameter for name, parameter in found.items() if name not in loaded.missing}


def _require_same_decays(built: "nn.Module", native: NativeTarget, path: str) -> None:
    from ..layers.decay import FIXED

    for number, (block, layer) in enumerate(zip(native.stack, built.model.layers, strict=True)):
        slopes = getattr(getattr(layer, "self_attn", None), "slope_rate", None)
        if isinstance(block, LightningBlock) and slopes is not None:
            ours = -FIXED[block.decay](slopes.numel(), number, len(native.stack))
            if not ours.allclose(slopes.float().flatten(), atol=1e-6):
                raise UserError(
                    f"initial: {path}: the decays of layer {number} are not those of decay: {block.decay}"
                )
