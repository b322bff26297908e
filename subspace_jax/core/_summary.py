"""Summarizes an adapted tree as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from subspace_jax.core._compat import is_tracer
from subspace_jax.core._paths import leaves_with_paths
from subspace_jax.core._types import Params
from subspace_jax.core._weight import Weight, is_weight


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One leaf of an adapted tree.

    Attributes:
      path: where the leaf is.
      role: how the model uses it, as far as known.
      method: the method that stands there, empty for an ordinary frozen array.
      shape: shape of the array stood for.
      rank: rank of the trainable part, where there is one.
      trainable: number of values that learn, padding left out.
      size: number of values of the array stood for.
    """

    path: str
    role: str
    method: str
    shape: tuple[int, ...]
    rank: int | None
    trainable: int
    size: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The rows of an adapted tree, which print as a table.

    Attributes:
      rows: one per leaf, in the order of the tree.
    """

    rows: Sequence[SummaryRow]

    @property
    def trainable(self) -> int:
        """Number of values that learn."""
        return sum(row.trainable for row in self.rows)

    @property
    def size(self) -> int:
        """Number of values of the unadapted model."""
        return sum(row.size for row in self.rows)

    def __iter__(self) -> Iterator[SummaryRow]:
        return iter(self.rows)

    def __str__(self) -> str:
        adapted = [r for r in self.rows if r.method]
        header = ("path", "role", "method", "shape", "rank", "trainable", "share")
        cells = [
            (
                *(row.path, row.role, row.method, "x".join(map(str, row.shape))),
                *(
                    "" if row.rank is None else str(row.rank),
                    f"{row.trainable:,}",
                    self._share(row.trainable),
                ),
            )
            for row in adapted
        ]
        frozen = len(self.rows) - len(adapted)
        cells.append((f"{frozen} other leaves", "", "frozen", "", "", "0", ""))
        cells.append(("total", "", "", f"{self.size:,}", "", f"{self.trainable:,}", self._share(self.trainable)))
        widths = [max(len(r[i]) for r in (header, *cells)) for i in range(len(header))]
        right = {4, 5, 6}

        def line(row: Sequence[str]) -> str:
            pairs = zip(row, widths, strict=True)
            return "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(pairs)).rstrip()

        rule = "  ".join("-" * w for w in widths)
        return "\n".join([line(header), rule, *map(line, cells[:-1]), rule, line(cells[-1])])

    def _share(self, count: int) -> str:
        return f"{100 * count / self.size:.3f}%" if self.size else ""


def trainable_size(weight: Weight) -> int:
    """Returns the number of values of a weight that learn.

    Padding, such as the spare slots of stacked layers with unequal ranks, does not count where arrays have values;
    where they are abstract, every value of a trainable field does.
    """
    total = 0
    for name, value in weight.data_items():
        if isinstance(value, Weight):
            total += trainable_size(value)
        elif name in weight.trainable:
            total += _learning(weight, name, value)
    return total


def _learning(weight: Weight, name: str, value: Any) -> int:
    """The values of one field that learn; all of them where only their shapes are known."""
    arrays = [leaf for _, item in weight.data_items() for leaf in jax.tree.leaves(item)]
    known = all(isinstance(v, (jax.Array, np.ndarray)) and not is_tracer(v) for v in arrays)
    size = weight.learning_size(name) if known else None
    return sum(v.size for v in jax.tree.leaves(value)) if size is None else size


def summary(adapted: Params) -> Summary:
    """Reports path, role, method, shape, rank and trainable values of every leaf.

    Args:
      adapted: a tree with stand-in weights; arrays may be abstract.

    Returns:
      A `Summary`; print it for the table.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> print(sj.summary(sj.adapt(params, {"kernel": sj.lora(rank=1)}, key=jax.random.key(0))))
      path            role   method  shape  rank  trainable    share
      --------------  -----  ------  -----  ----  ---------  -------
      kernel          dense  lora    4x3       1          7  46.667%
      1 other leaves         frozen                       0
      --------------  -----  ------  -----  ----  ---------  -------
      total                          15                   7  46.667%
    """

    def row(path: str, leaf: Any) -> SummaryRow:
        if is_weight(leaf):
            method = "" if leaf.stored else leaf.method or type(leaf).__name__
            return SummaryRow(path, leaf.role.kind, method, leaf.shape, leaf.rank, trainable_size(leaf), leaf.size)
        shape = tuple(getattr(leaf, "shape", ()))
        return SummaryRow(path, "", "", shape, None, 0, int(getattr(leaf, "size", 1)))

    return Summary([row(path, leaf) for path, leaf in leaves_with_paths(adapted)])
