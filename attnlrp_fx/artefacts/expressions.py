"""Symbolic sizes as text and back, without `eval`.

torch.export writes a size as sympy's `srepr`, as "Mul(Integer(2), Symbol('s0', integer=True))".
sympy reads that by running it. Here it is parsed, and made of calls of the functions below alone,
of numbers and of names of symbols; anything else is an error.
"""

import ast
import re
from collections.abc import Callable
from typing import Any

import sympy

from attnlrp_fx.torch_private import SIZE_FUNCTIONS

_SYMPY = (
    "Add",
    "Mul",
    "Max",
    "Min",
    "Equality",
    "Unequality",
    "LessThan",
    "StrictLessThan",
    "GreaterThan",
    "StrictGreaterThan",
    "And",
    "Or",
    "Not",
)
_ASSUMPTIONS = ("integer", "positive", "nonnegative", "real", "finite", "negative", "zero")
_SYMBOL = re.compile(r"(s|u|z)[a-z_]{0,20}\d{1,9}")
_LONGEST, _LARGEST, _HIGHEST_POWER = 4000, 1 << 64, 16


def as_text(expression: Any) -> str:
    """An expression as `expression_of` reads it."""
    return str(sympy.srepr(expression))


def expression_of(text: str) -> Any:
    """The sympy expression that a text says.

    Raises:
        ValueError: it says anything but an expression of sizes.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise ValueError("a size is no expression")
    return _made(ast.parse(text, mode="eval").body)


def _made(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return getattr(sympy, node.id)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _called(node.func.id, node)
    raise ValueError(f"a size has a {type(node).__name__} in it")


def _called(name: str, node: ast.Call) -> Any:
    if name == "Symbol":
        return _symbol(node)
    if node.keywords:
        raise ValueError(f"a size calls {name} with keywords")
    if name in ("Integer", "Rational"):
        return getattr(sympy, name)(*map(_number, node.args))
    arguments = [_made(argument) for argument in node.args]
    if name == "Pow":
        return _power(*arguments)
    function: Callable[..., Any] | None = SIZE_FUNCTIONS.get(name)
    if name in _SYMPY:
        function = getattr(sympy, name)
    if function is None:
        raise ValueError(f"a size calls {name}")
    return function(*arguments)


def _symbol(node: ast.Call) -> Any:
    if len(node.args) != 1 or not isinstance(node.args[0], ast.Constant):
        raise ValueError("a size has a symbol without a name")
    name = node.args[0].value
    if not isinstance(name, str) or not _SYMBOL.fullmatch(name):
        raise ValueError(f"a size has a symbol {name!r}")
    assumptions = {}
    for keyword in node.keywords:
        value = keyword.value
        if keyword.arg not in _ASSUMPTIONS or not isinstance(value, ast.Constant):
            raise ValueError(f"a size assumes '{keyword.arg}'")
        if not isinstance(value.value, bool):
            raise ValueError(f"a size assumes '{keyword.arg}'")
        assumptions[keyword.arg] = value.value
    return sympy.Symbol(name, **assumptions)


def _number(node: ast.expr) -> int:
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    value = node.operand if isinstance(node, ast.UnaryOp) and negative else node
    if not isinstance(value, ast.Constant) or type(value.value) is not int:
        raise ValueError("a size has a number that is no integer")
    if abs(value.value) > _LARGEST:
        raise ValueError("a size has a number that is too large")
    return -value.value if negative else value.value


def _power(base: Any, exponent: Any) -> Any:
    if not exponent.is_Integer or abs(int(exponent)) > _HIGHEST_POWER:
        raise ValueError(f"a size is a power of {exponent}")
    return sympy.Pow(base, exponent)
