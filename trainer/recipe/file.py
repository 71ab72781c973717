"""From a YAML file, its bases and the command line's overrides to a checked :class:`Recipe`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, one_line, suggest
from ..paths import expand_path
from .check import check_recipe
from .schema import FOR_A_FILE, Recipe

SHIPPED = Path(__file__).parents[2] / "recipes"
_YAML_ERRORS = (yaml.YAMLError, UnicodeDecodeError, RecursionError)


class _StrictLoader(yaml.SafeLoader):
    """YAML without its traps: 1e-3 is a number; `no`, 12:30 and 2026-01-01 are strings; a duplicate
    key is an error.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError):
            # What PyYAML raises for a value that does not fit its tag: `!!int x`, `!!bool x`.
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise yaml.MarkedYAMLError(
                problem=f"this is no {tag}; leave {tag} out", problem_mark=node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="expected a mapping", problem_mark=node.start_mark)
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and _SURROGATE.search(value):
            raise yaml.MarkedYAMLError(
                problem="half of a surrogate pair is no character", problem_mark=node.start_mark
            )
        return value


_SURROGATE = re.compile("[\ud800-\udfff]")


_FLOAT = (
    r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"  # 1e-3 too
)
_SCALARS = (
    # YAML's type, the text of such a value, its first characters
    ("null", r"~|null|", "~n\0"),
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
)
_StrictLoader.yaml_implicit_resolvers = {}
for _type, _text, _first in _SCALARS:
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_type}", re.compile(f"^(?:{_text})$"), list(_first)
    )
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


class _Dumper(yaml.SafeDumper):
    """Quotes a string that either YAML 1.1 or the strict loader would read as something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_StrictLoader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in yaml.SafeDumper.yaml_implicit_resolvers | _StrictLoader.yaml_implicit_resolvers
}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe at a path or of a shipped name, with ``section.key=value`` overrides.

    Raises:
        UserError: with every problem found, one a line.
    """
    path = find_recipe(name)
    content = _with_bases(path, ())
    for override in overrides:
        _apply_override(content, override)
    return check_recipe(content, path.name)


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """Return the file of a recipe by its path, which may be relative to ``beside``, or by its
    shipped name.

    Raises:
        UserError: there is none.
    """
    try:
        path = expand_path(name)
    except ValueError as error:
        raise UserError(f"recipe {name}: {error}") from None
    for candidate in ((beside or Path()) / path, SHIPPED / path, SHIPPED / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = [str(path.relative_to(SHIPPED).with_suffix("")) for path in shipped_recipes()]
    raise UserError(
        f"recipe {name}: no such file or shipped recipe{suggest(name, shipped)}; "
        f"shipped: {', '.join(shipped)}"
    )


def shipped_recipes() -> list[Path]:
    """Return all shipped recipes but those whose names begin with an underscore, which are parts of
    others.
    """
    return sorted(path for path in SHIPPED.rglob("*.yaml") if not path.name.startswith("_"))


def to_yaml(recipe: Recipe) -> str:
    """Return YAML that loads as the same recipe."""
    content = recipe.model_dump(mode="json", context=FOR_A_FILE)
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def _with_bases(path: Path, descendants: tuple[Path, ...]) -> dict:
    """Return a recipe's content merged over that of its bases.

    Args:
        descendants: the recipes that have this one as a base.
    """
    if path.resolve() in descendants:
        raise UserError(f"{path}: base: is its own ancestor")
    content = _read(path)
    bases = content.pop("base", [])
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) for base in bases):
        raise UserError(
            f"{path}: base: must be the path or name of a recipe, or a list of them, got {bases!r}"
        )
    merged: dict = {}
    for base in bases:
        base_path = find_recipe(base, path.parent)
        merged = _merge(merged, _with_bases(base_path, (*descendants, path.resolve())))
    return _merge(merged, content)


def _read(path: Path) -> dict:
    try:
        content = yaml.load(path.read_text(), _StrictLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        position = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{position}: {_yaml_problem(error)}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path}: a recipe is a mapping of sections, this is {kind}")
    return content


def _yaml_problem(error: Exception) -> str:
    """Return what is wrong with some YAML, on one line."""
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return " ".join(str(getattr(error, "problem", None) or error).split())


def _merge(base: dict, over: dict) -> dict:
    """Return ``over`` laid on ``base``: mappings merge, other values replace, and a null removes
    the inherited key.

    The sources of a mixture replace those inherited: their weights only mean something together.
    """
    merged = dict(base)
    for key, value in over.items():
        if value is None and key in base:
            del merged[key]
        elif isinstance(value, dict) and isinstance(base.get(key), dict) and key != "sources":
            merged[key] = _merge(base[key], value)
        else:
            merged[key] = value
    return merged


def _apply_override(content: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        shown = one_line(override)
        raise UserError(f"{shown}: an override is section.key=value, as in training.steps=100")
    if _SURROGATE.search(override):
        raise UserError(f"{one_line(override)}: an override is text in UTF-8")
    try:
        value = yaml.load(text, _StrictLoader)
    except _YAML_ERRORS as error:
        raise UserError(f"{key}: {text!r} is not YAML: {_yaml_problem(error)}") from None
    *parents, last = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise UserError(f"{key}: {parent} is not a section")
    if value is None:
        content.pop(last, None)
    else:
        content[last] = value
