"""Every key of a recipe as Markdown tables, from the schema: ``longspan recipes --keys``."""

import json
from collections.abc import Generator, Iterator

from ..layers.base import Block
from ..layers.linear import LinearAttentionBlock
from ..layers.softmax import SoftmaxBlock
from .schema import Recipe

_SHARED_KEYS = {
    Block: "every block",
    SoftmaxBlock: "blocks with softmax attention",
    LinearAttentionBlock: "blocks with linear attention",
}
"""Classes whose keys several kinds of block have in common, and the name of these blocks."""
_BOUNDS = {
    "exclusiveMinimum": "> {}",
    "minimum": ">= {}",
    "exclusiveMaximum": "< {}",
    "maximum": "<= {}",
}
_PLAIN_TYPES = {"string": "text", "boolean": "`true`, `false`", "null": "`null`"}


_TOP = """\
# Every key of a recipe

Printed by `longspan recipes --keys`. How to write one: [writing-recipes.md](writing-recipes.md).
"""


def recipe_keys() -> str:
    """Return Markdown with a section for each of a recipe's, and for each kind of block."""
    schema = Recipe.model_json_schema()
    return _TOP + "\n".join(_Page(schema["$defs"]).section("", schema)) + "\n"


class _Page:
    """The page, line by line. Definitions and values are nodes of a JSON schema."""

    def __init__(self, definitions: dict[str, dict]):
        self._definitions = definitions
        self._paths: dict[str, str] = {}
        """The dotted path at which the page has the section of a definition."""

    def section(
        self, path: str, definition: dict, known: dict[str, dict] | None = None
    ) -> Iterator[str]:
        """Yield a mapping's keys but for those that are ``known``, then the sections in it."""
        yield f"\n### {f'`{path}`' if path else 'The recipe'}\n"
        if path and definition.get("description"):
            yield definition["description"].replace("``", "`") + "\n"

        known = known or {}
        keys = {
            name: value
            for name, value in definition["properties"].items()
            if known.get(name) != value
        }
        prefix = f"{path}." if path else ""
        if keys:
            yield "| key | value | default | meaning |"
            yield "| --- | --- | --- | --- |"
        for name, value in keys.items():
            is_required = name in definition.get("required", ())
            default = "required" if is_required else _default(value)
            kind = self._kind(value, f"{prefix}{name}")
            yield f"| `{name}` | {kind} | {default} | {_meaning(value)} |"
        for name, value in keys.items():
            yield from self._inner_sections(f"{prefix}{name}", value)

    def _inner_sections(self, path: str, value: dict) -> Iterator[str]:
        """Yield the sections that a value may be, or hold."""
        if "discriminator" in value:
            yield from self._alternatives(path, value)
            return
        for node in [value, *value.get("anyOf", ())]:
            if "$ref" not in node:
                continue
            name = _name(node)
            if self._paths.setdefault(name, path) == path:  # else it has its section already
                yield from self.section(path, self._definitions[name])
        if "items" in value:
            yield from self._inner_sections(path, value["items"])
        if isinstance(value.get("additionalProperties"), dict):
            yield from self._inner_sections(path, value["additionalProperties"])

    def _alternatives(self, path: str, value: dict) -> Iterator[str]:
        """Yield a section for every kind that a value may be."""
        kinds = [self._definitions[_name(kind)] for kind in value["oneOf"]]
        key = value["discriminator"]["propertyName"]
        known: dict[str, dict] = {}
        if key == "mixer":
            known = yield from self._shared_sections(path, kinds)
        for kind in kinds:
            word = kind["properties"][key]
            shared = {**known, key: word} if known else {}
            yield from self.section(f"{path}: {{{key}: {word['const']}}}", kind, shared)

    def _shared_sections(
        self, path: str, kinds: list[dict]
    ) -> Generator[str, None, dict[str, dict]]:
        """Yield a section for the keys that several kinds of block share, and return these keys."""
        shared: dict[str, dict] = {}
        for base, blocks in _SHARED_KEYS.items():
            schema = base.model_json_schema()
            mixers = [
                f"`{kind['properties']['mixer']['const']}`"
                for kind in kinds
                if schema["properties"].keys() <= kind["properties"].keys()
            ]
            about = f"Keys of {', '.join(mixers)}."
            yield from self.section(f"{path}: {blocks}", {**schema, "description": about}, shared)
            shared |= schema["properties"]
        return shared

    def _kind(self, value: dict, path: str) -> str:
        """Return what the value at this path may be."""
        if "const" in value:
            return f"`{value['const']}`"
        if "enum" in value:
            return ", ".join(f"`{choice}`" for choice in value["enum"])
        if "anyOf" in value:
            return " or ".join(self._kind(choice, path) for choice in value["anyOf"])
        if "$ref" in value:
            path = self._paths.setdefault(_name(value), path)
            return f"[mapping](#{path.replace('.', '').lower()})"
        if "discriminator" in value:
            return "mapping, see below"
        match value.get("type", "anything"):
            case "integer":
                return f"whole number {_bounds(value)}".strip()
            case "number":
                return f"number {_bounds(value)}".strip()
            case "array":
                return self._list(value, path)
            case "object":
                inner = value.get("additionalProperties")
                if not isinstance(inner, dict):
                    return "mapping"
                return f"mapping of names to {self._kind(inner, path)}"
            case kind:
                return _PLAIN_TYPES.get(kind, kind)

    def _list(self, value: dict, path: str) -> str:
        fixed_items = value.get("prefixItems", [])
        items = fixed_items or [value.get("items", {})]
        kinds = dict.fromkeys(self._kind(item, path) for item in items)
        count = f"{len(fixed_items)} " if fixed_items else ""
        return f"list of {count}{', '.join(kinds)}"


def _bounds(value: dict) -> str:
    bounds = [
        text.format(f"{value[name]:,}".removesuffix(".0"))
        for name, text in _BOUNDS.items()
        if name in value
    ]
    return " and ".join(bounds)


def _meaning(value: dict) -> str:
    """Return a key's docstring as the cell of a table."""
    text = value.get("description", "").replace("``", "`")
    return " ".join(text.split()).replace("|", "\\|")


def _default(value: dict) -> str:
    default = value.get("default", "")
    if isinstance(default, dict) or default == "":
        return ""
    return f"`{json.dumps(default)}`".replace('"', "")


def _name(node: dict) -> str:
    """Return the name of the definition that a node refers to."""
    return node["$ref"].split("/")[-1]
