"""Evaluate an exporter's expression for a dimension, given sizes for the names in it.

``batch``, ``past_sequence + sequence``, ``Min(64, sequence)``, ``((batch*sequence)//batch)``: the notation of
sympy and torch, read as Python and evaluated here, because sympy takes longer to import than an estimate may
take, and because `eval` must not run text from a file.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction

Number = int | Fraction

# Bits of a numerator and of a denominator. More are refused, since expressions come from files: the value of
# ``((2/3)**16)**16`` is small, but every further power makes its fraction sixteen times as long.
_MAX_BITS, _MAX_EXPONENT = 63, 16
# Limit of characters in an expression: its syntax tree takes some hundred times as much memory.
_MAX_LENGTH = 4096


def evaluate(expression: str, sizes: Mapping[str, int]) -> int | None:
    """Return the value of a dimension, or None if it is unknown.

    Args:
        expression: A name, or integers and names with ``+ - * / // % **``, ``Max``, ``Min``, ``Mod``,
            ``FloorDiv``, ``floor`` and ``ceiling``.
        sizes: Name → size. A whole expression may be a name: a grouped convolution's B has the dimension
            ``conv.rank/4``.
    """
    if expression in sizes:
        return sizes[expression]
    try:
        value = _value(_parsed(expression), sizes)
    except (SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, RecursionError, MemoryError):
        return None
    return int(value) if value == int(value) else None


def names_in(expression: str) -> set[str]:
    """Return the names in an expression; none if it is a name itself, or not an expression."""
    try:
        parsed = _parsed(expression)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    if isinstance(parsed, ast.Name | ast.Attribute):
        return set()
    called = {id(node.func) for node in ast.walk(parsed) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(parsed) if isinstance(node, ast.Name) and id(node) not in called}


def _parsed(expression: str) -> ast.expr:
    if len(expression) > _MAX_LENGTH:
        raise ValueError("the expression is too long for a dimension")
    return ast.parse(expression.strip(), mode="eval").body


def _value(node: ast.expr, sizes: Mapping[str, int]) -> Number:
    value: Number
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            value = number
        case ast.Name() | ast.Attribute():
            value = sizes[ast.unparse(node)]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand, sizes)
        case ast.BinOp(left=left, op=operation, right=right):
            value = _OPERATORS[type(operation)](_value(left, sizes), _value(right, sizes))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            value = _FUNCTIONS[name](*(_value(argument, sizes) for argument in arguments))
        case _:
            raise ValueError(f"{type(node).__name__} is not allowed in a dimension")
    # Of operands within this limit, no operation makes more than _MAX_EXPONENT times as many bits.
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise ValueError("the dimension is too large")
    return value


def _divide(number: Number, by: Number) -> Number:
    # Exact, because the expression may multiply the result.
    return Fraction(number) / Fraction(by)


def _power(base: Number, exponent: Number) -> Number:
    if not 0 <= exponent <= _MAX_EXPONENT or exponent != int(exponent):
        raise ValueError("the power is too large for a dimension")
    return base ** int(exponent)


_OPERATORS: dict[type[ast.AST], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "floor": math.floor,
    "ceiling": math.ceil,
}
