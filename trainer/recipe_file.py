"""From a YAML file, its bases and the command line's overrides to a checked :class:`Recipe`."""

import difflib
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from .errors import UserError
from .recipe import CombinationError, Recipe

SHIPPED = Path(__file__).parent.parent / "recipes"
# The last three: what PyYAML lets through of a value that does not fit its explicit tag, as in `!!int x`.
_NOT_YAML = (yaml.YAMLError, UnicodeDecodeError, ValueError, AttributeError, TypeError)
# Divisible by whatever a recipe divides by; stands in for a required number that is faulty.
_STAND_IN = 2**16 * 3**3 * 5 * 7


class _StrictLoader(yaml.SafeLoader):
    """YAML without its traps: 1e-3 is a number, `no` and 12:30 and 2026-01-01 are strings, a duplicate key is an error."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|", "~n\0"),
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or the strict loader would not read as the string it is."""

    yaml_implicit_resolvers: ClassVar[dict] = {
        first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_StrictLoader.yaml_implicit_resolvers.get(first, [])]
        for first in {**yaml.SafeDumper.yaml_implicit_resolvers, **_StrictLoader.yaml_implicit_resolvers}
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
    raise UserError(f"recipe {name}: no such file or shipped recipe{_suggest(name, shipped)}; shipped: {', '.join(shipped)}")


def shipped_recipes() -> list[Path]:
    return sorted(SHIPPED.rglob("*.yaml"))


def check_recipe(content: dict, source: str) -> Recipe:
    """The recipe that ``content`` describes; ``source`` names it in errors."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = _problems(error, content)
    problems += _combination_problems(content, {key for key, _ in problems})
    raise UserError("\n".join(f"{source}: {key}: {reason}" for key, reason in problems))


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
        raise UserError(f"{path}: a recipe is a mapping of sections, this is {type(content).__name__}")
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise UserError(f"{path}: base: must be the path or name of a recipe, got {base!r}")
    return _merge(_with_bases(find_recipe(base, path.parent), (*inside, path.resolve())), content)


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
        raise UserError(f"{key}: {value!r} is not YAML: {getattr(error, 'problem', error)}") from None
    *parents, last = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise UserError(f"{key}: {parent} is not a section")
    if parsed is None:
        content.pop(last, None)
    else:
        content[last] = parsed


def _is_combination(error: ValidationError) -> bool:
    return isinstance(error.errors()[0].get("ctx", {}).get("error"), CombinationError)


def _problems(error: ValidationError, content: dict) -> list[tuple[str, str]]:
    """(key, reason and fix) of everything that is wrong."""
    if _is_combination(error):
        return error.errors()[0]["ctx"]["error"].problems
    return [(_key(item["loc"], content), _reason(item)) for item in error.errors()]


def _combination_problems(content: dict, faulty: set[str]) -> list[tuple[str, str]]:
    """Impossible combinations of the keys that are not faulty, so that all problems are told at once."""
    content = _without(content, faulty)
    for _ in range(2):
        try:
            Recipe.model_validate(content)
        except ValidationError as error:
            if _is_combination(error):
                unknown_stack = any(key.startswith("model.layers") for key in faulty)
                return [
                    (key, reason)
                    for key, reason in _problems(error, content)
                    if str(_STAND_IN) not in reason
                    and key not in faulty
                    and not (unknown_stack and key.startswith("model.layers"))
                ]
            for item in error.errors():
                *sections, last = _key(item["loc"], content).split(".")
                if ".".join((*sections, last)) in faulty and (section := _at(content, sections)) is not None:
                    section[last] = _STAND_IN
    return []


def _at(content: Any, path: list[str]) -> dict | None:
    for part in path:
        content = content.get(part) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else None


def _key(loc: tuple, content: Any) -> str:
    """The dotted key of an error; pydantic's location also names the chosen kind of a block, which is no key."""
    path = []
    for depth, part in enumerate(loc):
        inside = (isinstance(content, dict) and part in content) or (isinstance(content, list) and part in range(len(content)))
        if inside or depth == len(loc) - 1:
            path.append(str(part))
            content = content[part] if inside else None
    return ".".join(path)


def _reason(item: dict) -> str:
    if item["type"] == "extra_forbidden":
        fields = _fields(item["loc"][:-1])
        return f"unknown key{_suggest(item['loc'][-1], fields)}; known here: {', '.join(fields)}"
    if item["type"] == "missing":
        return "is required"
    if item["type"] == "union_tag_invalid":
        kinds = item["ctx"]["expected_tags"].replace("'", "")
        return f"unknown mixer {item['ctx']['tag']!r}{_suggest(item['ctx']['tag'], kinds.split(', '))}; known: {kinds}"
    if item["type"] == "union_tag_not_found":
        return "names no mixer; as in {mixer: full}"
    reason = item["msg"].removeprefix("Input ")
    return f"{reason[0].lower()}{reason[1:]}, got {item['input']!r}"


def _fields(loc: tuple) -> list[str]:
    """Keys of the section at that location, from the schema."""
    schema = Recipe.model_json_schema()
    node = schema
    for part in loc:
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        if part in node.get("properties", {}):
            node = node["properties"][part]
        elif "discriminator" in node:
            node = {"$ref": node["discriminator"]["mapping"][part]}
        else:
            node = node.get("additionalProperties", {})
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return list(node.get("properties", {}))


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(str(word), known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _without(content: Any, keys: set[str], prefix: str = "") -> Any:
    """A copy of nested mappings without those dotted keys."""
    if not isinstance(content, dict):
        return content
    return {k: _without(v, keys, f"{prefix}{k}.") for k, v in content.items() if f"{prefix}{k}" not in keys}
