"""Initial weights from a Hugging Face folder, for a recipe that has the same layers or has changed
some of them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from ..recipe.schema import InitialConfig, Recipe
from .custom_target import CustomTarget
from .folder import LoadedModel, abbreviated, load_folder
from .model_to_export import ModelToExport
from .native.base import NativeTarget
from .registry import NATIVE_TARGETS
from .tensor_map import TensorMap, by_layer

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig

    from ..engines.engine import Engine
    from ..ranks import RankGroup


class _Folder(NamedTuple):
    """A folder with initial weights, before its model is loaded."""

    path: Path
    config: dict[str, Any]
    """Its ``config.json``."""
    target: NativeTarget
    """Its architecture, with the recipe's model."""


def require_initial(recipe: Recipe) -> None:
    """Refuse a folder that the recipe cannot start from, before any process starts.

    Raises:
        UserError: the folder has no model of a known architecture, its files are not those of its
            config, its sizes differ, it computes what no recipe can express, or ``initial`` does
            not list a parameter that only one of the two has; one line for each.
    """
    if recipe.initial is None:
        return
    folder = _open_folder(recipe, recipe.initial)
    loaded = _load(recipe.initial)
    names = _parameters(loaded, folder.target).keys() | loaded.unexpected
    problems = [
        *_size_problems(folder),
        *_inexpressible(folder.target, loaded.model.config),
        *_one_sided_problems(folder.target, recipe.initial, names),
    ]
    if problems:
        raise UserError("\n".join(problems))


def load_initial(engine: "Engine", recipe: Recipe, ranks: "RankGroup") -> list[str]:
    """Load the weights of ``recipe.initial``, which the first rank reads and sends to the others
    layer by layer; every rank calls it.

    Returns:
        Lines to print about it, on the first rank; none on others.

    Raises:
        UserError: a tensor has another shape, or the folder's fixed decays are not the recipe's.
    """
    initial = recipe.initial
    assert initial is not None
    target = _open_folder(recipe, initial).target
    hf_tensors: dict[str, Tensor] = {}
    lines: list[str] = []
    with ranks.raise_on_all():
        if ranks.is_first:
            loaded = _load(initial)
            problem = next(target.buffer_problems(loaded.model), None)
            if problem:
                raise UserError(f"initial: {initial.path}: {problem}")
            hf_tensors = {
                name: parameter.detach() for name, parameter in _parameters(loaded, target).items()
            }
            lines = [
                f"starting from the weights of {initial.path}",
                *_differences(target, loaded.model.config),
            ]

    shapes = _weight_shapes(engine, ranks)
    for layer_maps in by_layer(target.tensor_maps()):
        weights: dict[str, Tensor] = {}
        with ranks.raise_on_all():
            if ranks.is_first:
                weights = _joined(layer_maps, hf_tensors, shapes, initial)
        on_all_ranks = {}
        for tensor_map in layer_maps:
            name = tensor_map.megatron_name
            on_all_ranks[name] = ranks.broadcast_tensor(weights.get(name), shapes[name])
        engine.load_weights(on_all_ranks)
    return lines


def _weight_shapes(engine: "Engine", ranks: "RankGroup") -> dict[str, "torch.Size"]:
    """Return the shapes of all whole weights by global name, on whatever ranks they are."""
    prefix = "model."
    local_shapes = {
        name.removeprefix(prefix): shards.shape
        for name, shards in engine.state().items()
        if name.startswith(prefix)
    }
    shapes: dict[str, torch.Size] = {}
    for rank_shapes in ranks.gather(local_shapes):
        shapes |= rank_shapes
    return shapes


def _joined(
    layer_maps: Iterable[TensorMap],
    hf_tensors: "Mapping[str, Tensor]",
    shapes: "Mapping[str, torch.Size]",
    initial: InitialConfig,
) -> "dict[str, Tensor]":
    """Return the parameters of a layer in fp32, by global name."""
    weights = {}
    for tensor_map in layer_maps:
        name = tensor_map.megatron_name
        try:
            weights[name] = tensor_map.from_hf(tensor_map.select(hf_tensors), shapes[name])
        except ValueError as error:
            raise UserError(f"initial: {initial.path}: {error}") from None
    return weights


def _open_folder(recipe: Recipe, initial: InitialConfig) -> _Folder:
    path = Path(initial.path)
    try:
        config = json.loads((path / "config.json").read_text())
        model_type = config["model_type"]
    except OSError as error:
        raise UserError(
            f"initial: {path}/config.json: {error.strerror}; "
            "set initial to the folder of a Hugging Face model"
        ) from None
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"initial: {path}/config.json: is not the config of a Hugging Face model; "
            "set initial to the folder of one"
        ) from None

    known = {native.model_type: native for native in NATIVE_TARGETS}
    if model_type not in known:
        raise UserError(
            f"initial: {path}: has the architecture {model_type}; "
            f"use a model of one of these: {', '.join(known)}"
        )
    target = known[model_type](ModelToExport.of_recipe(recipe))
    return _Folder(path, config, target)


def _load(initial: InitialConfig) -> LoadedModel:
    return load_folder(initial.path, f"initial: {initial.path}", dtype="auto")


def _parameters(loaded: LoadedModel, target: NativeTarget) -> "dict[str, Tensor]":
    """Return the parameters that the folder's files give.

    If the output matrix is the embedding, it is there under both names, unless ours are one too.
    """
    parameters = dict(loaded.model.named_parameters(remove_duplicate=False))
    if target.model.tie_word_embeddings and loaded.model.config.tie_word_embeddings:
        del parameters["lm_head.weight"]
    return {name: weight for name, weight in parameters.items() if name not in loaded.missing}


def _size_problems(folder: _Folder) -> Iterator[str]:
    for key, size in folder.target.required_sizes().items():
        hf_size = folder.config.get(key)
        if hf_size is not None and hf_size != size:
            yield (
                f"initial: {key}: is {hf_size} in the folder's config.json, but {size} in the "
                "recipe's model; they must be the same"
            )


def _inexpressible(target: NativeTarget, config: "PreTrainedConfig") -> Iterator[str]:
    """Yield what the folder's model computes that no recipe can express."""
    fixed_values = {"rope_type": "default", "hidden_act": "silu", **target.fixed_values()}
    hf_values = {key: getattr(config, key, None) for key in fixed_values}
    hf_values["rope_type"] = (config.rope_parameters or {}).get("rope_type", "default")
    for key, fixed_value in fixed_values.items():
        if hf_values[key] != fixed_value:
            yield (
                f"initial: {key}: is {hf_values[key]} in the folder's config.json, but the "
                f"recipe's model always has {fixed_value}; use another folder"
            )


def _differences(target: NativeTarget, config: "PreTrainedConfig") -> Iterator[str]:
    """Yield what the weights were trained with, if the recipe says otherwise."""
    model = target.model
    hf_values = {
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": (config.rope_parameters or {}).get("rope_theta"),
    }
    compared: dict[str, tuple[Any, Any]] = {
        f"model.{key}": (getattr(model, key), hf_value)
        for key, hf_value in hf_values.items()
        if hf_value is not None
    }
    for layer, (name, block) in enumerate(zip(model.stack_names, model.stack, strict=True)):
        for key, hf_value in target.trained_with(config, layer).items():
            value = getattr(block, key, hf_value)  # some kinds of layer do not have the key
            compared[f"model.layers.blocks.{name}.{key}"] = (value, hf_value)

    for key, (value, hf_value) in compared.items():
        if value != hf_value:
            yield f"{key}: {value}, but the weights were trained with {hf_value}"


def _one_sided_problems(
    target: NativeTarget, initial: InitialConfig, hf_names: set[str]
) -> Iterator[str]:
    """Yield parameters that only the recipe's model has, or only the folder's, unless ``initial``
    lists them; and what it lists without need.
    """
    tensor_maps = list(target.tensor_maps())
    all_names = {
        tensor_map.megatron_name for tensor_map in CustomTarget(target.to_export).tensor_maps()
    }
    mapped_names = {tensor_map.megatron_name for tensor_map in tensor_maps}
    mapped_hf_names = {name for tensor_map in tensor_maps for name in tensor_map.hf_rows}

    new = sorted(all_names - mapped_names)
    unused = sorted(name for name in hf_names - mapped_hf_names if not target.has_no_effect(name))
    yield from _unnamed(new, initial.new, "new", "the folder's model does not have")
    yield from _unnamed(unused, initial.unused, "unused", "the recipe's model does not use")
    missing = sorted(mapped_hf_names - hf_names)
    if missing:
        yield (
            f"initial: {abbreviated(missing)}: missing from the folder's files; "
            "use a folder that is complete"
        )


def _unnamed(names: list[str], patterns: list[str], key: str, what: str) -> Iterator[str]:
    """Yield which names match no pattern of ``initial.key``, and which patterns match no name."""
    unnamed = [
        name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if unnamed:
        yield (
            f"initial: {what} {abbreviated(unnamed)}; "
            f"if that is intended, list them under initial.{key}"
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield (
                f"initial.{key}: {pattern} matches none of the {len(names)} {key} parameters; "
                "remove it"
            )
