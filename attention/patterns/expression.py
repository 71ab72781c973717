"""Patterns as text, for recipes and the command line: ``S2(64, 16, 16) | Sinks(4)``."""

import ast
from collections.abc import Callable

from .base import ClosedFormPattern
from .patterns import S2, Causal, Dilated, PerHead, Sinks, Streaming, Stripes, Window

PATTERNS: dict[str, Callable[..., ClosedFormPattern]] = {
    "Causal": Causal,
    "Window": Window,
    "Sinks": Sinks,
    "Stripes": Stripes,
    "Dilated": Dilated,
    "S2": S2,
    "Streaming": Streaming,
    "PerHead": PerHead,
}
"""The patterns that an expression may call. Adding a pattern is a class and a line here."""

_Value = ClosedFormPattern | tuple["_Value", ...] | int | None
"""What a part of an expression stands for."""


def parse_pattern(text: str) -> ClosedFormPattern:
    """Return the pattern that ``text`` describes: calls of known patterns, joined by ``|``.

    Raises:
        ValueError: saying what is wrong with the text, in one line.
    """
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError:
        raise ValueError(
            f"{text!r} is not a pattern; write one like S2(64, 16, 16) | Sinks(4)"
        ) from None
    except (RecursionError, MemoryError):  # the latter is what the parser raises
        raise ValueError(f"{text[:60]!r}... has too many parts, or is nested too deeply") from None
    if not isinstance(value, ClosedFormPattern):
        raise ValueError(f"{text!r} is not a pattern; known: {', '.join(PATTERNS)}")
    return value


def _evaluate(node: ast.expr) -> _Value:
    match node:
        case ast.BinOp(op=ast.BitOr()):
            return _evaluate_pattern(node.left) | _evaluate_pattern(node.right)
        case ast.Call(func=ast.Name(id=name)) if name in PATTERNS:
            return _call(PATTERNS[name], node)
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return tuple(map(_evaluate, elements))
        case ast.Constant(value=int() | None as value):
            return value
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
            raise ValueError(f"unknown pattern {name!r}; known: {', '.join(PATTERNS)}")
    raise ValueError(f"{ast.unparse(node)!r} is neither a pattern nor a whole number")


def _call(pattern: Callable[..., ClosedFormPattern], node: ast.Call) -> ClosedFormPattern:
    """Call ``pattern`` with the arguments of ``node``; ValueError if they do not fit."""
    keywords = {str(keyword.arg): _evaluate(keyword.value) for keyword in node.keywords}
    arguments = tuple(map(_evaluate, node.args))
    try:
        return pattern(*arguments, **keywords)
    except TypeError as error:
        message = str(error).replace("__init__", "").replace(".()", "()")
        raise ValueError(f"{ast.unparse(node)}: {message}") from None


def _evaluate_pattern(node: ast.expr) -> ClosedFormPattern:
    value = _evaluate(node)
    if not isinstance(value, ClosedFormPattern):
        raise ValueError(f"{ast.unparse(node)!r} is not a pattern; known: {', '.join(PATTERNS)}")
    return value
