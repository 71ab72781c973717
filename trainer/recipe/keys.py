"""Every key of a recipe as Markdown tables, from the schema of :mod:`.recipe`: ``longspan recipes --keys``."""

import json
from collections.abc import Iterator

from ..layers.base import Block
from ..layers.linear import LinearAttentionBlock
from ..layers.softmax import SoftmaxBlock
from .schema import Recipe

_SHARED = {
    Block: "every block",
    SoftmaxBlock: "blocks with softmax attention",
    LinearAttentionBlock: "blocks with linear attention",
}
"""Whose keys several mixers have in common."""
_BOUNDS = {
    "exclusiveMinimum": "> {}",
    "minimum": ">= {}",
    "exclusiveMaximum": "< {}",
    "maximum": "<= {}",
}


_TOP = """\
# Every key of a recipe

Printed by `longspan recipes --keys`. How to write one: [writing-recipes.md](writing-recipes.md).
"""


def recipe_keys() -> str:
    """Markdown: a section for each of the recipe's, and in the layers' one for each mixer."""
    schema = Recipe.model_json_schema()
    return _TOP + "\n".join(_Page(schema["$defs"]).section("", schema)) + "\n"


class _Page:
    def __init__(self, definitions: dict[str, dict]):
        self._definitions = definitions
        self._paths: dict[str, str] = {}
        """Of the definitions that were met: where their section is."""

    def section(
        self, path: str, definition: dict, known: dict[str, dict] | None = None
    ) -> Iterator[str]:
        """Of a mapping: its keys but for those that are ``known``, then the sections in it."""
        yield f"\n### {f'`{path}`' if path else 'The recipe'}\n"
        if path and definition.get("description"):
            yield definition["description"].replace("``", "`") + "\n"

        def inside(name: str) -> str:
            return f"{path}.{name}" if path else name

        known = known or {}
        own = {
            name: value
            for name, value in definition["properties"].items()
            if known.get(name) != value
        }
        if own:
            yield "| key | value | default | meaning |"
            yield "| --- | --- | --- | --- |"
        for name, value in own.items():
            default = "required" if name in definition.get("required", ()) else self._default(value)
            about = " ".join(value.get("description", "").replace("``", "`").split()).replace(
                "|", "\\|"
            )
            yield f"| `{name}` | {self._kind(value, inside(name))} | {default} | {about} |"
        for name, value in own.items():
            yield from self._inside(inside(name), value)

    def _inside(self, path: str, value: dict) -> Iterator[str]:
        """The sections that a value may be, or hold."""
        if "discriminator" in value:
            kinds = [self._definitions[_name(kind)] for kind in value["oneOf"]]
            if value["discriminator"]["propertyName"] == "mixer":
                yield from self._blocks(path, kinds)
            else:
                for kind in kinds:
                    yield from self.section(
                        f"{path}: {{name: {kind['properties']['name']['const']}}}", kind
                    )
            return
        for reference in [value, *value.get("anyOf", ())]:
            if (
                "$ref" in reference
                and self._paths.setdefault(name := _name(reference), path) == path
            ):
                yield from self.section(path, self._definitions[name])
        if "items" in value:
            yield from self._inside(path, value["items"])
        if isinstance(value.get("additionalProperties"), dict):
            yield from self._inside(path, value["additionalProperties"])

    def _blocks(self, path: str, kinds: list[dict]) -> Iterator[str]:
        shared: dict[str, dict] = {}
        for base, which in _SHARED.items():
            schema = base.model_json_schema()
            having = [
                kind["properties"]["mixer"]["const"]
                for kind in kinds
                if schema["properties"].keys() <= kind["properties"].keys()
            ]
            about = f"Of {', '.join(f'`{mixer}`' for mixer in having)}."
            yield from self.section(f"{path}: {which}", {**schema, "description": about}, shared)
            shared |= schema["properties"]
        for kind in kinds:
            mixer = kind["properties"]["mixer"]
            yield from self.section(
                f"{path}: {{mixer: {mixer['const']}}}", kind, {**shared, "mixer": mixer}
            )

    def _kind(self, value: dict, path: str) -> str:
        """What the value at this path may be."""
        if "const" in value:
            return f"`{value['const']}`"
        if "enum" in value:
            return ", ".join(f"`{each}`" for each in value["enum"])
        if "anyOf" in value:
            return " or ".join(self._kind(each, path) for each in value["anyOf"])
        if "$ref" in value:
            path = self._paths.setdefault(_name(value), path)
            return f"[mapping](#{path.replace('.', '').lower()})"
        if "discriminator" in value:
            return "mapping, see below"
        kind = value.get("type", "anything")
        if kind in ("integer", "number"):
            bounds = [
                text.format(f"{value[name]:,}".removesuffix(".0"))
                for name, text in _BOUNDS.items()
                if name in value
            ]
            return " ".join(
                [{"integer": "whole number", "number": "number"}[kind], " and ".join(bounds)]
            ).strip()
        if kind == "array":
            fixed = value.get("prefixItems", [])
            kinds = dict.fromkeys(
                self._kind(each, path) for each in fixed or [value.get("items", {})]
            )
            return " ".join(["list of", *([str(len(fixed))] if fixed else []), ", ".join(kinds)])
        if kind == "object":
            inner = value.get("additionalProperties")
            return (
                f"mapping of names to {self._kind(inner, path)}"
                if isinstance(inner, dict)
                else "mapping"
            )
        return {"string": "text", "boolean": "`true`, `false`", "null": "`null`"}.get(kind, kind)

    def _default(self, value: dict) -> str:
        default = value.get("default", "")
        return (
            ""
            if isinstance(default, dict) or default == ""
            else f"`{json.dumps(default)}`".replace('"', "")
        )


def _name(reference: dict) -> str:
    """Of a definition."""
    return reference["$ref"].split("/")[-1]
