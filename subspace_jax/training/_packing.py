"""Packs sequences of unequal length into rows of one length: one shape for a compiled step, and little padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PackedRows(NamedTuple):
    """Sequences in rows of one length.

    Attributes:
      tokens: int32 `[rows, length]`; zero at padding.
      labels: bool `[rows, length]`, true at tokens that are learned.
      segments: int32 `[rows, length]`, which sequence of its row a token is of, from 1; zero at padding.
      members: for every row the indices of its sequences, in order.
    """

    tokens: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    members: tuple[tuple[int, ...], ...]


def pack_sequences(
    tokens: Sequence[np.ndarray], labels: Sequence[np.ndarray], length: int, *, pack: bool = True
) -> PackedRows:
    """Packs sequences into rows, the longest first, each into the first row that has room.

    A model that is told `segments` computes for every sequence what it computes for it alone: attention stays inside
    a segment and positions start at zero in each.

    Args:
      tokens: integer `[n_i]` for every sequence.
      labels: bool `[n_i]`, which tokens are learned; never a sequence's first, which nothing predicts.
      length: of the rows.
      pack: False puts every sequence into a row of its own, in the given order.

    Returns:
      The rows.

    Raises:
      ValueError: a sequence is empty or longer than a row, its labels are not of its length, or its first token is a
        label.

    Example:
      >>> import numpy as np
      >>> tokens = [np.array([5, 6]), np.array([7, 8, 9]), np.array([4])]
      >>> rows = pack_sequences(tokens, [t > 5 for t in tokens[:1]] + [np.arange(3) > 0, np.array([False])], 4)
      >>> rows.tokens.tolist(), rows.segments.tolist(), rows.members
      ([[7, 8, 9, 4], [5, 6, 0, 0]], [[1, 1, 1, 2], [1, 1, 0, 0]], ((1, 2), (0,)))
    """
    for index, (ids, learned) in enumerate(zip(tokens, labels, strict=True)):
        if not 0 < len(ids) <= length or len(learned) != len(ids) or learned[0]:
            raise ValueError(
                f"pack_sequences: sequence {index} has {len(ids)} tokens and {len(learned)} labels for rows of "
                f"{length}; expected 1 to {length} tokens, a label for each, and none at the first."
            )
    sizes = [len(ids) for ids in tokens]
    members = _first_fit(sizes, length) if pack else [[index] for index in range(len(sizes))]
    shape = (len(members), length)
    rows = PackedRows(
        np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.int32), tuple(map(tuple, members))
    )
    for row, inside in enumerate(members):
        start = 0
        for segment, index in enumerate(inside, 1):
            place = slice(start, start + sizes[index])
            rows.tokens[row, place] = tokens[index]
            rows.labels[row, place] = labels[index]
            rows.segments[row, place] = segment
            start += sizes[index]
    return rows


def _first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    members: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = next((row for row, left in enumerate(room) if left >= sizes[index]), None)
        if place is None:
            place = len(room)
            members.append([])
            room.append(length)
        members[place].append(index)
        room[place] -= sizes[index]
    return members
