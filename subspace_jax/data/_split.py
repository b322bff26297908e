"""Splits rows into training and validation: stratified, with exact copies on one side."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from ._errors import DataError
from ._rows import Rows


@dataclasses.dataclass(frozen=True)
class Split:
    """Which rows train and which validate.

    Attributes:
        train: indices of rows, ascending.
        validation: the same.
    """

    train: tuple[int, ...]
    validation: tuple[int, ...]


def split_rows(
    inputs: Sequence[Any], fraction: float = 0.1, *, labels: Sequence[Hashable] | None = None, seed: int = 0
) -> Split:
    """Splits rows so that exact copies of an input stay on one side and every class is on both.

    Args:
        inputs: what the model sees of each row (texts, conversations); equal ones are copies, whatever their labels.
        fraction: of the rows for validation, between 0 and 1.
        labels: classes; None splits without regard to them.
        seed: another one gives another split. Nothing else decides it, so that every method and batch size sees the
            same.

    Returns:
        The split. A class all of whose rows are copies of one input stays in training.

    Raises:
        DataError: the fraction is not between 0 and 1, or all rows are copies of one input.

    Example:
        >>> found = split_rows(["a", "b", "a", "c"], 0.25, seed=0)
        >>> sorted([*found.train, *found.validation]), (0 in found.train) == (2 in found.train)
        ([0, 1, 2, 3], True)
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(f"a validation fraction of {fraction:g}; expected one between 0 and 1.")
    copies: dict[Any, list[int]] = collections.defaultdict(list)
    for index, value in enumerate(inputs):
        copies[json.dumps(value, sort_keys=True, ensure_ascii=False)].append(index)
    groups = list(copies.values())
    if len(groups) < 2:
        raise DataError(f"all {len(inputs)} rows are copies of one input; there is nothing to validate on.")
    by_class: dict[Hashable, list[list[int]]] = collections.defaultdict(list)
    for group in groups:
        by_class[None if labels is None else labels[group[0]]].append(group)
    chosen: list[int] = []
    random = np.random.default_rng(seed)
    for members in by_class.values():
        chosen += _choose([members[i] for i in random.permutation(len(members))], fraction)
    validation = set(chosen)
    if not validation:
        validation = set(groups[int(random.integers(len(groups)))])
    return Split(tuple(i for i in range(len(inputs)) if i not in validation), tuple(sorted(validation)))


def _choose(groups: Sequence[Sequence[int]], fraction: float) -> list[int]:
    """Groups whose rows come nearest to the fraction, at least one and never all."""
    wanted = fraction * sum(map(len, groups))
    chosen: list[int] = []
    for group in groups[:-1]:
        # Nearest from below or above: a large group is taken where that misses the mark by less.
        if not chosen or abs(len(chosen) + len(group) - wanted) < abs(len(chosen) - wanted):
            chosen += group
    return chosen


def check_classes(rows: Rows, labels: Sequence[Any], held_out: Sequence[Any] = ()) -> tuple[Any, ...]:
    """Returns the classes in order, refusing data from which they cannot be learned.

    Args:
        rows: of the labels, for messages.
        labels: one for each row.
        held_out: labels of a validation file, where there is one.

    Returns:
        The classes, ascending.

    Raises:
        DataError: one class only; a class seen once, where no validation file is given; or a class that only the
            validation file has.
    """
    counts = collections.Counter(labels)
    if len(counts) < 2:
        raise DataError(f"{rows.source}: every row has the label {next(iter(counts))!r}; at least two are needed.")
    if not held_out:
        lines = [f"{rows.where(i)}: {label!r}" for i, label in enumerate(labels) if counts[label] == 1]
        if lines:
            raise DataError(
                f"{rows.source}: {len(lines)} classes have one row each, which cannot be in training and in "
                "validation. Give more rows, drop them, or name a validation file:",
                lines,
            )
    unseen = sorted(set(held_out) - set(counts), key=str)
    if unseen:
        raise DataError(f"the validation file has classes that training never sees: {', '.join(map(repr, unseen))}.")
    return tuple(sorted(counts))
