"""Equations as tokens: prefix order of a tree, numbers as sign, mantissa and exponent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

PAD = "<pad>"
BINARY = ("add", "sub", "mul", "div")
UNARY = ("neg", "inv", "sin", "cos", "pow", "pow2", "pow3")
# "pow" takes a base and an exponent.
_ARITY = {**dict.fromkeys(BINARY, 2), **dict.fromkeys(UNARY, 1), "pow": 2}
LEAVES = ("u_0", "ut_0", "utt_0", "ux_0", "uxx_0", "uxxx_0", "uxxxx_0", "x")
DIGITS = 3
_LARGEST = 10
_MANTISSA = 10**DIGITS

Expression = Any
"""A leaf's name, a number, or a tuple of an operator and its operands."""


def vocabulary() -> tuple[str, ...]:
    """Returns all tokens; a token's number is its place, that of padding is 0.

    Example:
      >>> len(vocabulary()), vocabulary()[0]
      (1053, '<pad>')
    """
    numbers = [f"N{n}" for n in range(_MANTISSA)]
    exponents = [f"E{e}" for e in range(-_LARGEST, _LARGEST + 1)]
    return (PAD, *BINARY, *UNARY, *LEAVES, "+", "-", *map(str, range(10)), *numbers, *exponents)


_NUMBERS = {token: i for i, token in enumerate(vocabulary())}


def encode_float(value: float) -> tuple[str, str, str]:
    r"""Returns a number as sign, mantissa of three digits and exponent: \(\pm N \cdot 10^E\).

    Args:
      value: finite, of magnitude below 1e13; what is below 1e-8 loses digits, and below 1e-10 becomes zero.

    Raises:
      ValueError: it is not finite, or too large for the exponents that have a token.

    Example:
      >>> encode_float(-0.0314), encode_float(9.999)
      (('-', 'N314', 'E-4'), ('+', 'N100', 'E-1'))
    """
    if not math.isfinite(value) or abs(value) >= _MANTISSA * 10**_LARGEST:
        raise ValueError(f"encode_float: {value!r}; expected a finite number below 1e13 in magnitude.")
    sign = "-" if value < 0 else "+"
    if value == 0:
        return sign, "N0", "E0"
    exponent = max(math.floor(math.log10(abs(value))) - (DIGITS - 1), -_LARGEST)
    mantissa = round(abs(value) / 10.0**exponent)
    if mantissa >= _MANTISSA:
        mantissa, exponent = mantissa // 10, exponent + 1
    if exponent > _LARGEST:
        raise ValueError(f"encode_float: {value!r}; rounds to 1e13, for which there is no exponent.")
    return sign, f"N{mantissa}", f"E{exponent}" if mantissa else "E0"


def decode_float(tokens: Sequence[str]) -> float:
    """Returns the number that three tokens stand for.

    Args:
      tokens: sign, mantissa, exponent.

    Raises:
      ValueError: they are no number.

    Example:
      >>> decode_float(("-", "N314", "E-4"))
      -0.0314
    """
    sign, mantissa, exponent = tokens if len(tokens) == 3 else ("", "", "")
    if sign not in ("+", "-") or mantissa[:1] != "N" or exponent[:1] != "E":
        raise ValueError(f"decode_float: {tuple(tokens)}; expected a sign, N and digits, E and an exponent.")
    size = int(mantissa[1:]) * 10.0 ** int(exponent[1:]) if int(exponent[1:]) >= 0 else 0.0
    size = size or int(mantissa[1:]) / 10.0 ** -int(exponent[1:])
    return -size if sign == "-" else size


def prefix(expression: Expression) -> list[str]:
    """Returns the tokens of a tree in prefix order, without begin and end.

    Args:
      expression: nested tuples `(operator, operand, ...)` of leaves' names and numbers; integers become digits, floats
        three tokens. A chain of "add" may have more than two operands.

    Raises:
      ValueError: an unknown name, or an operator with the wrong number of operands.

    Example:
      >>> prefix(("sub", "ut_0", ("mul", 0.003, "uxx_0")))
      ['sub', 'ut_0', 'mul', '+', 'N300', 'E-5', 'uxx_0']
    """
    if isinstance(expression, bool) or not isinstance(expression, (int, float, str, tuple)):
        raise ValueError(f"prefix: {expression!r}; expected a leaf, a number, or a tuple of an operator and operands.")
    if isinstance(expression, int):
        return ["-" if expression < 0 else "+", *str(abs(expression))]
    if isinstance(expression, float):
        return list(encode_float(expression))
    if isinstance(expression, str):
        if expression not in LEAVES:
            raise ValueError(f"prefix: leaf {expression!r}; expected one of {', '.join(LEAVES)}.")
        return [expression]
    operator, *operands = expression
    if operator not in _ARITY:
        raise ValueError(f"prefix: operator {operator!r}; expected one of {', '.join(_ARITY)}.")
    if operator == "add" and len(operands) > 2:
        return ["add", *prefix(operands[0]), *prefix(("add", *operands[1:]))]
    if len(operands) != _ARITY[operator]:
        raise ValueError(f"prefix: {operator!r} has {len(operands)} operands; expected {_ARITY[operator]}.")
    return [operator, *(token for operand in operands for token in prefix(operand))]


def encode_equations(expressions: Sequence[Expression], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns token numbers of equations, padded to one length, and where they are valid.

    Args:
      expressions: trees, "left side minus right side".
      length: tokens a row; that of the longest by default.

    Returns:
      int32 `[n, length]`, 0 where padded, and bool `[n, length]`.

    Raises:
      ValueError: an equation is longer than `length`, or no tree.

    Example:
      >>> tokens, mask = encode_equations(["ut_0", ("sub", "ut_0", "uxx_0")])
      >>> tokens.shape, mask.sum(1).tolist()
      ((2, 3), [1, 3])
    """
    rows = [[_NUMBERS[token] for token in prefix(e)] for e in expressions]
    longest = max(map(len, rows), default=0)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"encode_equations: an equation has {longest} tokens; expected at most length={length}.")
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return tokens, mask
