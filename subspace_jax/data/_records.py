"""Plain records that readers yield, and the rule that assigns them to splits."""

import hashlib
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "validation", "test")
_VALIDATION_SHARE = 0.1
_TEST_SHARE = 0.2


class TextRecord(NamedTuple):
    """A text and what is known about it.

    Attributes:
        text: the text, not empty.
        label: class name, or a rating as a float.
        group: what must not be torn over two splits: a film, a review, an e-mail thread.
        split: "train" or "test" where the source says so, otherwise None.
    """

    text: str
    label: str | float
    group: str
    split: str | None = None


class ImageRecord(NamedTuple):
    """An image of one gray channel.

    Attributes:
        image: uint8 [height, width, 1].
        label: class index.
        split: "train" or "test" where the source says so, otherwise None.
    """

    image: np.ndarray
    label: int
    split: str | None = None


class PairRecord(NamedTuple):
    """An image in color with its caption.

    Attributes:
        image: uint8 [height, width, 3].
        text: the caption.
        category: name of its category.
        topic: name of its finer topic.
        group: what must not be torn over two splits, also between datasets.
    """

    image: np.ndarray
    text: str
    category: str
    topic: str
    group: str


class OperatorRecord(NamedTuple):
    """One pair of functions on a grid.

    Attributes:
        input: float32, the coefficient or the initial condition.
        output: float32, the solution.
        split: "train" or "test" where the source says so, otherwise None.
    """

    input: np.ndarray
    output: np.ndarray
    split: str | None = None


def split_of(group: str, split: str | None = None) -> str:
    """Assigns a group of records to a split by a hash, so that machine and order of reading do not matter.

    A tenth goes to validation. A fifth goes to the test split, unless the source has a test split of its own.

    Args:
        group: what must stay together.
        split: "train" or "test" where the source says so, otherwise None.

    Returns:
        "train", "validation" or "test".

    Example:
        >>> split_of("any", "test"), split_of("casablanca") == split_of("casablanca")
        ('test', True)
    """
    if split == "test":
        return "test"
    digest = hashlib.sha256(group.encode("utf8")).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < _VALIDATION_SHARE:
        return "validation"
    if split is None and position < _VALIDATION_SHARE + _TEST_SHARE:
        return "test"
    return "train"
