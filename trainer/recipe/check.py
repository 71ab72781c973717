"""All that is wrong with a recipe at once: each problem with its key, a reason and a fix."""

import re
from typing import Any

from pydantic import ValidationError

from ..errors import UserError, one_line, suggest
from .combinations import combination_problems
from .problem import Problem
from .schema import Recipe

_INSTANCE = re.compile(
    r"valid dictionary(?: or (?:instance of \w+|object to extract fields from))?"
)
"""Pydantic's word for a mapping."""

# For required keys that are faulty. Both are divisible by whatever a recipe divides by; a problem
# that is not the same with either one speaks of a number that the recipe does not have.
_STAND_INS = (2**16 * 3**3 * 5 * 7, 2**17 * 3**3 * 5 * 7)
_DEGREES = ("parallel.tp", "parallel.pp", "parallel.cp", "parallel.ep")
# A stand-in for a section shows that its keys are missing, and that these have limits.
_STAND_IN_ROUNDS = 4


def check_recipe(content: dict, source: str) -> Recipe:
    """Return the recipe that ``content`` describes.

    Args:
        source: the recipe's name in messages.

    Raises:
        UserError: with every problem, one a line.
    """
    try:
        recipe = Recipe.model_validate(content)
        problems = list(combination_problems(recipe))
        if not problems:
            return recipe
    except ValidationError as error:
        problems = _schema_problems(error)
    problems += _other_combination_problems(content, {problem.key for problem in problems})
    lines = [one_line(f"{source}: {key}: {reason}") for key, reason in problems]
    raise UserError("\n".join(lines))


def _schema_problems(error: ValidationError) -> list[Problem]:
    return [Problem(_key(item["loc"]), _reason(item)) for item in error.errors()]


def _other_combination_problems(content: dict, faulty: set[str]) -> list[Problem]:
    """Return the impossible combinations of keys that are not faulty, to report all at once."""
    first, second = (_combination_problems_with(content, faulty, number) for number in _STAND_INS)
    stack_is_unknown = any(
        key.startswith(("model.layers", "model.num_key_value_heads")) for key in faulty
    )
    return [
        problem
        for problem in first
        if problem in second
        and problem.key not in faulty
        and not (stack_is_unknown and problem.key.startswith("model.layers"))
    ]


def _combination_problems_with(content: dict, faulty: set[str], stand_in: int) -> list[Problem]:
    """Return the impossible combinations of ``content`` where faulty keys have their defaults, or
    ``stand_in`` if they are required.
    """
    content = _without(content, faulty)
    if stand_in == _STAND_INS[-1]:
        # Unlike the default, 1, so that no problem is said to come from a degree that is faulty.
        for degree in faulty.intersection(_DEGREES):
            section_name, name = degree.split(".")
            content[section_name][name] = 2
    for _ in range(_STAND_IN_ROUNDS):
        try:
            return list(combination_problems(Recipe.model_validate(content)))
        except ValidationError as error:
            for item in error.errors():
                key = _key(item["loc"])
                *parents, last = key.split(".")
                section = _section_at(content, parents)
                if key in faulty and section is not None:
                    section[last] = _stand_in_of_type(item, stand_in)
    return []


def _stand_in_of_type(item: Any, stand_in: int) -> str | int:
    """Return ``stand_in`` as pydantic's error wants it: as text, or within a limit."""
    if item["type"] == "string_type":
        return str(stand_in)
    if item["type"] == "less_than_equal":
        return item["ctx"]["le"] // (1 if stand_in == _STAND_INS[0] else 2)
    return stand_in


def _section_at(content: Any, path: list[str]) -> dict | None:
    """Return the mapping at a dotted path, also through lists, or None if there is none."""
    for name in path:
        if isinstance(content, list):
            content = {str(number): value for number, value in enumerate(content)}
        content = content.get(name) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else None


def _key(loc: tuple) -> str:
    """Return the dotted key of an error; pydantic's location also names the chosen kind of a block
    or engine, which is no key.
    """
    if loc[:3] == ("model", "layers", "blocks"):  # and then a block's name and its kind
        loc = (*loc[:4], *loc[5:])
    if loc[-1] == "[key]":  # a name in a mapping, which is its key
        loc = loc[:-1]
    if loc[0] == "engine":
        loc = (*loc[:1], *loc[2:])
    return ".".join(map(str, loc))


def _reason(item: Any) -> str:
    """Return what pydantic found wrong, in our words."""
    match item["type"]:
        case "extra_forbidden":
            known = _keys_at(item["loc"][:-1])
            suggestion = suggest(item["loc"][-1], known)
            return f"unknown key{suggestion}; known here: {', '.join(known)}"
        case "missing":
            return "is required"
        case "value_error":
            return f"{item['ctx']['error']}, got {item['input']!r}"
        case "union_tag_invalid":
            tag = item["ctx"]["tag"]
            kinds = item["ctx"]["expected_tags"].replace("'", "")
            suggestion = suggest(tag, kinds.split(", "))
            return f"unknown {_discriminator(item)} {tag!r}{suggestion}; known: {kinds}"
        case "union_tag_not_found":
            key = _discriminator(item)
            example = {"mixer": "full", "name": "deepspeed"}[key]
            return f"needs a {key}, as in {{{key}: {example}}}"
    reason = _INSTANCE.sub("mapping", item["msg"].removeprefix("Input "))
    return f"{reason[0].lower()}{reason[1:]}, got {item['input']!r}"


def _discriminator(item: Any) -> str:
    """Return the key that chooses among the kinds of a section: ``mixer`` or ``name``."""
    return item["ctx"]["discriminator"].strip("'")


def _keys_at(loc: tuple) -> list[str]:
    """Return the keys of the section at pydantic's location, from the schema."""
    schema = Recipe.model_json_schema()

    def resolved(node: dict) -> dict:
        optional = [kind for kind in node.get("anyOf", ()) if "$ref" in kind]
        node = optional[0] if optional else node
        return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node

    node = schema
    for name in loc:
        if name in node.get("properties", {}):
            node = resolved(node["properties"][name])
        elif isinstance(name, int):
            node = resolved(node.get("items", {}))
        elif "discriminator" in node:
            node = resolved({"$ref": node["discriminator"]["mapping"][name]})
        else:
            node = resolved(node.get("additionalProperties", {}))
    return list(node.get("properties", {}))


def _without(content: Any, keys: set[str], prefix: str = "") -> Any:
    """Return a copy of nested mappings, also within lists, without those dotted keys."""
    if isinstance(content, list):
        return [_without(value, keys, f"{prefix}{index}.") for index, value in enumerate(content)]
    if not isinstance(content, dict):
        return content
    return {
        name: _without(value, keys, f"{prefix}{name}.")
        for name, value in content.items()
        if f"{prefix}{name}" not in keys
    }
