"""All that is wrong with a recipe's content, at once: each problem with its key, the reason and a fix."""

from typing import Any

from pydantic import ValidationError

from ..errors import UserError, suggest
from .schema import CombinationError, Recipe

# Divisible by whatever a recipe divides by; stands in for a required number, or as text for a string, that is faulty.
_STAND_IN = 2**16 * 3**3 * 5 * 7


def check_recipe(content: dict, source: str) -> Recipe:
    """The recipe that ``content`` describes; ``source`` names it in errors."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = _problems(error)
    problems += _combination_problems(content, {key for key, _ in problems})
    raise UserError("\n".join(f"{source}: {key}: {reason}" for key, reason in problems))


def _is_combination(error: ValidationError) -> bool:
    return isinstance(error.errors()[0].get("ctx", {}).get("error"), CombinationError)


def _problems(error: ValidationError) -> list[tuple[str, str]]:
    """(key, reason and fix) of everything that is wrong."""
    if _is_combination(error):
        return error.errors()[0]["ctx"]["error"].problems
    return [(_key(item["loc"]), _reason(item)) for item in error.errors()]


def _combination_problems(content: dict, faulty: set[str]) -> list[tuple[str, str]]:
    """Impossible combinations of the keys that are not faulty, so that all problems are told at once."""
    content = _without(content, faulty)
    for _ in range(3):
        try:
            Recipe.model_validate(content)
        except ValidationError as error:
            if _is_combination(error):
                unknown_stack = any(
                    key.startswith(("model.layers", "model.num_key_value_heads")) for key in faulty
                )
                return [
                    (key, reason)
                    for key, reason in _problems(error)
                    if str(_STAND_IN) not in reason
                    and key not in faulty
                    and not (unknown_stack and key.startswith("model.layers"))
                ]
            for item in error.errors():
                *sections, last = _key(item["loc"]).split(".")
                if (
                    ".".join((*sections, last)) in faulty
                    and (section := _at(content, sections)) is not None
                ):
                    section[last] = str(_STAND_IN) if item["type"] == "string_type" else _STAND_IN
    return []


def _at(content: Any, path: list[str]) -> dict | None:
    for part in path:
        if isinstance(content, list):
            content = dict(zip(map(str, range(len(content))), content, strict=True))
        content = content.get(part) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else None


def _key(loc: tuple) -> str:
    """The dotted key of an error; pydantic's location also names the chosen kind of a block or engine, which is no key."""
    if loc[:3] == ("model", "layers", "blocks"):  # and then a block's name and its kind
        loc = (*loc[:4], *loc[5:])
    if loc[0] == "engine":
        loc = (*loc[:1], *loc[2:])
    return ".".join(map(str, loc))


def _reason(item: dict) -> str:
    if item["type"] == "extra_forbidden":
        fields = _fields(item["loc"][:-1])
        return f"unknown key{suggest(item['loc'][-1], fields)}; known here: {', '.join(fields)}"
    if item["type"] == "missing":
        return "is required"
    if item["type"] == "union_tag_invalid":
        kinds, what = (
            item["ctx"]["expected_tags"].replace("'", ""),
            item["ctx"]["discriminator"].strip("'"),
        )
        return f"unknown {what} {item['ctx']['tag']!r}{suggest(item['ctx']['tag'], kinds.split(', '))}; known: {kinds}"
    if item["type"] == "union_tag_not_found":
        what = item["ctx"]["discriminator"].strip("'")
        return f"has no {what}; as in {{{what}: {'full' if what == 'mixer' else 'deepspeed'}}}"
    reason = item["msg"].removeprefix("Input ")
    return f"{reason[0].lower()}{reason[1:]}, got {item['input']!r}"


def _fields(loc: tuple) -> list[str]:
    """Keys of the section at that location, from the schema."""
    schema = Recipe.model_json_schema()

    def followed(node: dict) -> dict:
        node = next(
            (kind for kind in node.get("anyOf", ()) if "$ref" in kind), node
        )  # a section that may be left out
        return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node

    node = schema
    for part in loc:
        if part in node.get("properties", {}):
            node = followed(node["properties"][part])
        elif isinstance(part, int):
            node = followed(node.get("items", {}))
        elif "discriminator" in node:
            node = followed({"$ref": node["discriminator"]["mapping"][part]})
        else:
            node = followed(node.get("additionalProperties", {}))
    return list(node.get("properties", {}))


def _without(content: Any, keys: set[str], prefix: str = "") -> Any:
    """A copy of nested mappings, in lists as well, without those dotted keys."""
    if isinstance(content, list):
        return [_without(value, keys, f"{prefix}{place}.") for place, value in enumerate(content)]
    if not isinstance(content, dict):
        return content
    return {
        k: _without(v, keys, f"{prefix}{k}.")
        for k, v in content.items()
        if f"{prefix}{k}" not in keys
    }
