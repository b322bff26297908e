"""Checks that the model configurations share."""

from __future__ import annotations

from typing import Any


def require_positive(config: Any, *names: str) -> None:
    """Refuses a configuration whose named fields are not positive integers."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name}={value!r}; expected a positive integer")


def require_divisible(config: Any, name: str, divisor: str) -> None:
    """Refuses a configuration where one field is not a multiple of another."""
    value, by = getattr(config, name), getattr(config, divisor)
    if value % by:
        raise ValueError(f"{type(config).__name__}.{name}={value} is not a multiple of {divisor}={by}")


def require_choice(owner: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a value outside the listed ones."""
    if value not in choices:
        raise ValueError(f"{owner}.{name}={value!r}; expected one of {', '.join(map(repr, choices))}")
