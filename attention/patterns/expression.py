"""Patterns written as text, as recipes and the command line have them: ``S2(64, 16, 16) | Sinks(4)``."""

import ast
import operator

from . import patterns
from .patterns import Pattern

KNOWN = ("Causal", "Window", "Sinks", "Stripes", "Dilated", "S2", "Streaming", "PerHead")


def parse_pattern(text: str) -> Pattern:
    """The pattern that ``text`` describes: calls of the named patterns with numbers, joined by ``|``.

    Raises:
        ValueError: saying what is wrong with it, in one line.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(
            f"{text!r} is no pattern; write one as S2(64, 16, 16) | Sinks(4)"
        ) from None
    pattern = _value(tree)
    if not isinstance(pattern, Pattern):
        raise ValueError(f"{text!r} is no pattern; known: {', '.join(KNOWN)}")
    return pattern


def _value(node: ast.expr):
    match node:
        case ast.BinOp(op=ast.BitOr()):
            return operator.or_(_pattern(node.left), _pattern(node.right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in KNOWN:
            options = {str(keyword.arg): _value(keyword.value) for keyword in keywords}
            try:
                return getattr(patterns, name)(*map(_value, args), **options)
            except TypeError as error:
                raise ValueError(
                    f"{ast.unparse(node)}: {str(error).replace('__init__', '').replace('.()', '()')}"
                ) from None
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return tuple(map(_value, elements))
        case ast.Constant(value=int() | None as value):
            return value
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
            raise ValueError(f"unknown pattern {name!r}; known: {', '.join(KNOWN)}")
    raise ValueError(f"{ast.unparse(node)!r} is neither a pattern nor a whole number")


def _pattern(node: ast.expr) -> Pattern:
    value = _value(node)
    if not isinstance(value, Pattern):
        raise ValueError(f"{ast.unparse(node)!r} is no pattern; known: {', '.join(KNOWN)}")
    return value
