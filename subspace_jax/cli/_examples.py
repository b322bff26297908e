"""Arrays of examples and the batches of a run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from subspace_jax.models import CausalEncoder


@dataclasses.dataclass(frozen=True)
class Examples:
    """Arrays with one row for each example, or for several that are packed together.

    Attributes:
      arrays: by name, all with rows on the first axis. Rows of zeros have no labels: they fill up the last batch.
      rows: for every row the places in the user's file, counted as the file's messages count them.
      details: for every example of the file what is said about it in the run's folder.
    """

    arrays: Mapping[str, np.ndarray]
    rows: tuple[tuple[int, ...], ...]
    details: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def steps(self, batch: int) -> int:
        """Returns the number of batches of one pass; the last may be partly filled."""
        return -(-len(self) // batch)

    def epochs(self, batch: int, seed: int, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches of pass after pass, each in an order of its own, from the `start`-th on."""
        per_epoch = self.steps(batch)
        epoch, skip = divmod(start, per_epoch)
        while True:
            order = np.random.default_rng([seed, epoch]).permutation(len(self))
            for step in range(skip, per_epoch):
                yield self.take(order[step * batch : (step + 1) * batch], batch)
            epoch, skip = epoch + 1, 0

    def once(self, batch: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Yields the indices and the batch, in order, each row once."""
        for start in range(0, len(self), batch):
            index = np.arange(start, min(start + batch, len(self)))
            yield index, self.take(index, batch)

    def take(self, index: np.ndarray, batch: int) -> dict[str, np.ndarray]:
        """Returns rows as a batch of one size, filled up with rows of zeros."""
        room = batch - len(index)
        return {
            name: np.pad(array[index], [(0, room)] + [(0, 0)] * (array.ndim - 1)) for name, array in self.arrays.items()
        }

    def digest(self) -> str:
        """Returns a hash of all arrays, by which a resumed run knows its data."""
        total = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            total.update(f"{name}{array.dtype}{array.shape}".encode())
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A user's data, ready for a model.

    Attributes:
      form: see `subspace_jax.data.find_form`; `images` for a folder of images.
      train: examples to learn from.
      validation: examples to judge by.
      classes: of a classification.
      encoder: of a language model's texts.
      report: what `data.json` says: counts, columns, row numbers of the split, and rows that were cut.
    """

    form: str
    train: Examples
    validation: Examples
    classes: tuple[Any, ...]
    encoder: CausalEncoder | None
    report: Mapping[str, Any]
