"""Labels of any tfds dataset as class indices with names, or as real numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def read_labels(
    name: str, info: Any, feature: str, values: Mapping[str, list[Any]]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Turns the labels of all splits into arrays.

    Splits whose labels are all -1, as hidden test labels are marked, are left out.

    Args:
        name: name of the dataset, for errors.
        info: its tfds info.
        feature: name of the label's feature.
        values: the labels read, by split.

    Returns:
        int32 [n] class indices by split and the names of the classes; or float32 [n] by split and no names
        where the labels are real numbers.

    Raises:
        ValueError: the labels are not one number or one string each, or some but not all are negative.
    """
    arrays = {split: np.asarray(labels) for split, labels in values.items()}
    for split, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind not in "iubfSUO":
            raise ValueError(
                f"dataset {name!r}, split {split!r}: feature {feature!r} must hold one number or string an "
                f"example, not arrays of shape {array.shape[1:]} and type {array.dtype}"
            )
    kinds = {array.dtype.kind for array in arrays.values()}
    if kinds == {"f"}:
        return {split: array.astype(np.float32) for split, array in arrays.items()}, ()
    if kinds <= set("SUO"):
        return _named({split: [_text(label) for label in labels] for split, labels in values.items()})
    visible = {split: array.astype(np.int32) for split, array in arrays.items() if not (array == -1).all()}
    lowest = min((int(array.min()) for array in visible.values()), default=-1)
    if lowest < 0:
        raise ValueError(f"dataset {name!r}: feature {feature!r} has a negative label or none at all")
    names = getattr(info.features[feature], "names", None)
    highest = max(int(array.max()) for array in visible.values())
    return visible, tuple(names or map(str, range(highest + 1)))


def _text(label: Any) -> str:
    return label.decode("utf8") if isinstance(label, bytes) else str(label)


def _named(values: Mapping[str, list[str]]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    names = sorted({label for labels in values.values() for label in labels})
    index = {label: i for i, label in enumerate(names)}
    return {split: np.asarray([index[label] for label in labels], np.int32) for split, labels in values.items()}, tuple(
        names
    )
