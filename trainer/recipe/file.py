"""From a YAML file, its bases and the command line's overrides to a checked :class:`Recipe`."""

import re
from pathlib import Path
from typing import ClassVar

import yaml

from ..errors import UserError, suggest
from .check import check_recipe
from .schema import Recipe

SHIPPED = Path(__file__).parents[2] / "recipes"
# The last three: what PyYAML lets through of a value that does not fit its explicit tag, as in `!!int x`.
_NOT_YAML = (yaml.YAMLError, UnicodeDecodeError, ValueError, AttributeError, TypeError)


class _StrictLoader(yaml.SafeLoader):
    """YAML without its traps: 1e-3 is a number, `no` and 12:30 and 2026-01-01 are strings, a duplicate key is an error."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|", "~n\0"),
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
):
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or the strict loader would not read as the string it is."""

    yaml_implicit_resolvers: ClassVar[dict] = {
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *_StrictLoader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {
            **yaml.SafeDumper.yaml_implicit_resolvers,
            **_StrictLoader.yaml_implicit_resolvers,
        }
    }


def load_recipe(name: str, overrides: list[str] = ()) -> Recipe:
    """The recipe of that path or shipped name, with ``section.key=value`` overrides.

    Raises:
        UserError: with every problem found, one a line.
    """
    path = find_recipe(name)
    content = _with_bases(path, ())
    for override in overrides:
        _apply_override(content, override)
    return check_recipe(content, path.name)


def find_recipe(name: str, beside: Path | None = None) -> Path:
    """The file of a recipe given by path (also relative to ``beside``) or by a shipped recipe's name."""
    for candidate in ((beside or Path()) / name, SHIPPED / name, SHIPPED / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = [str(path.relative_to(SHIPPED).with_suffix("")) for path in shipped_recipes()]
    raise UserError(
        f"recipe {name}: no such file or shipped recipe{suggest(name, shipped)}; shipped: {', '.join(shipped)}"
    )


def shipped_recipes() -> list[Path]:
    """All but those that begin with an underscore, which are parts of others."""
    return sorted(path for path in SHIPPED.rglob("*.yaml") if not path.name.startswith("_"))


def to_yaml(recipe: Recipe) -> str:
    """YAML that loads as the same recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def _with_bases(path: Path, inside: tuple[Path, ...]) -> dict:
    if path.resolve() in inside:
        raise UserError(f"{path}: base: is its own ancestor")
    try:
        content = yaml.load(path.read_text(), _StrictLoader)
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: a recipe is a mapping of sections, this is {type(content).__name__}"
        )
    bases, merged = content.pop("base", []), {}
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) for base in bases):
        raise UserError(
            f"{path}: base: must be the path or name of a recipe, or a list of them, got {bases!r}"
        )
    for base in bases:
        merged = _merge(
            merged, _with_bases(find_recipe(base, path.parent), (*inside, path.resolve()))
        )
    return _merge(merged, content)


def _merge(base: dict, over: dict) -> dict:
    """``over`` laid on ``base``: mappings merge, other values replace, and a null takes the inherited key away.

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
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override}: an override is section.key=value, as in training.steps=100")
    try:
        parsed = yaml.load(value, _StrictLoader)
    except _NOT_YAML as error:
        raise UserError(
            f"{key}: {value!r} is not YAML: {getattr(error, 'problem', error)}"
        ) from None
    *parents, last = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise UserError(f"{key}: {parent} is not a section")
    if parsed is None:
        content.pop(last, None)
    else:
        content[last] = parsed
