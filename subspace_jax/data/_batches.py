"""The order of examples, a function of seed and epoch alone, so that a killed run resumes with equal batches."""

from collections.abc import Iterator

import numpy as np


def _generator(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def epoch_order(size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Returns the order in which an epoch visits the examples.

    Args:
        size: number of examples.
        seed: non-negative seed of the run.
        epoch: non-negative number of the epoch.

    Returns:
        int64 [size], a permutation that depends on the arguments only.

    Example:
        >>> sorted(epoch_order(3, seed=0, epoch=1).tolist())
        [0, 1, 2]
    """
    return _generator(seed, epoch).permutation(size)


def subset(size: int, wanted: int | None, *, seed: int, what: str) -> np.ndarray:
    """Draws examples without replacement; a larger draw of the same seed contains a smaller one.

    Args:
        size: number of examples there are.
        wanted: number of examples to draw; all of them, in their own order, if None.
        seed: non-negative seed.
        what: name of the split, for the error.

    Returns:
        int64 [wanted] indices.

    Raises:
        ValueError: more examples are wanted than there are, or none.
    """
    if wanted is None:
        return np.arange(size)
    if not 0 < wanted <= size:
        raise ValueError(f"{wanted} examples asked of {what}, which has {size}; ask for 1 to {size}, or None")
    return _generator(seed).permutation(size)[:wanted]


def batch_indices(
    size: int,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    shuffle: bool = True,
    drop_remainder: bool = True,
) -> Iterator[np.ndarray]:
    """Yields the indices of an epoch's batches.

    Args:
        size: number of examples.
        batch_size: examples in a batch.
        seed: non-negative seed of the run.
        epoch: non-negative number of the epoch.
        start: batches to leave out, to resume in the middle of an epoch.
        shuffle: visit the examples in the epoch's order; in their own if False.
        drop_remainder: leave an incomplete last batch out.

    Yields:
        int64 [batch_size] indices.

    Raises:
        ValueError: batch_size or start is out of range, or no batch would be full.

    Example:
        >>> [batch.tolist() for batch in batch_indices(5, 2, shuffle=False, drop_remainder=False)]
        [[0, 1], [2, 3], [4]]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if drop_remainder and size < batch_size:
        raise ValueError(
            f"{size} examples fill no batch of {batch_size}; take a smaller batch_size or drop_remainder=False"
        )
    count = size // batch_size if drop_remainder else -(-size // batch_size)
    if not 0 <= start <= count:
        raise ValueError(f"start must be 0 to {count}, the number of batches, not {start}")
    order = epoch_order(size, seed=seed, epoch=epoch) if shuffle else np.arange(size)
    return (order[i * batch_size : min(size, (i + 1) * batch_size)] for i in range(start, count))
