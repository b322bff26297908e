"""What text, image and operator tasks share: named splits of arrays and batches of them."""

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from subspace_jax.data._batches import batch_indices, subset

_CHUNK = 4096

Split = TypeVar("Split")


@dataclasses.dataclass(frozen=True, eq=False)
class Task(abc.ABC, Generic[Split]):
    """A dataset in memory.

    Attributes:
        name: name of the dataset.
        splits: the splits by name.
    """

    name: str
    splits: Mapping[str, Split]

    def __getitem__(self, split: str) -> Split:
        """Returns a split by name; raises ValueError if the dataset has none of this name."""
        if split not in self.splits:
            raise ValueError(f"task {self.name!r} has no split {split!r}, but {', '.join(self.splits)}")
        return self.splits[split]

    @abc.abstractmethod
    def arrays(self, split: str) -> dict[str, np.ndarray]:
        """Returns a split's arrays by name, all with the examples along the first axis."""

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        shuffle: bool = True,
        drop_remainder: bool = True,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Iterates over an epoch of a split; the order depends on seed and epoch only.

        Args:
            split: name of the split.
            batch_size: examples in a batch.
            seed: non-negative seed of the run.
            epoch: non-negative number of the epoch.
            start: batches to leave out, to resume in the middle of an epoch.
            shuffle: visit the examples in the epoch's order; in their own if False.
            drop_remainder: leave an incomplete last batch out.

        Returns:
            An iterator over dictionaries of arrays, as `arrays` gives them.

        Raises:
            ValueError: there is no such split, batch_size or start is out of range, or no batch would be
            full.
        """
        arrays = self.arrays(split)
        indices = batch_indices(
            len(next(iter(arrays.values()))),
            batch_size,
            seed=seed,
            epoch=epoch,
            start=start,
            shuffle=shuffle,
            drop_remainder=drop_remainder,
        )
        return ({name: array[rows] for name, array in arrays.items()} for rows in indices)


def read_rows(name: str, split: str, source: Any, size: int | None, *, seed: int) -> Iterator[dict[str, Any]]:
    """Yields examples of a split, fetched in chunks.

    Args:
        name: name of the dataset, for errors.
        split: name of the split.
        source: its tfds random-access source.
        size: number of examples to draw; all, in their own order, if None. Splits other than `train` give
        what
            they have where they have fewer.
        seed: non-negative seed of the draw.

    Yields:
        One dictionary per example.

    Raises:
        ValueError: `train` has fewer examples than asked, or none are asked.
    """
    if size is not None and split != "train":
        size = min(size, len(source))
    rows = subset(len(source), size, seed=seed, what=f"split {split!r} of {name!r}")
    for begin in range(0, len(rows), _CHUNK):
        yield from source.__getitems__(rows[begin : begin + _CHUNK].tolist())


def require_features(name: str, info: Any, wanted: Iterable[str], *, parameters: str) -> None:
    """Refuses features that a dataset does not have.

    Args:
        name: name of the dataset.
        info: its tfds info.
        wanted: names of features.
        parameters: names of the caller's parameters that choose features, for the error.

    Raises:
        ValueError: a feature is absent.
    """
    absent = [feature for feature in wanted if feature not in info.features]
    if absent:
        raise ValueError(
            f"dataset {name!r} has no feature {', '.join(map(repr, absent))}, but "
            f"{', '.join(map(repr, info.features))}; choose with {parameters}"
        )
