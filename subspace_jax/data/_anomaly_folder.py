"""Images for anomaly detection in the folder layout of MVTec AD: normal ones to fit to, labeled ones to test with."""

from __future__ import annotations

import dataclasses
import os
import pathlib

import numpy as np

from subspace_jax.data._errors import DataError
from subspace_jax.data._image_folder import ImageFolder, images_below, load_image_folder, read_image

GOOD = "good"


@dataclasses.dataclass(frozen=True, eq=False)
class AnomalyFolder:
    """One category of the layout.

    Attributes:
        name: of the category.
        train: normal images to fit to, those of `train/good`.
        test: all test images.
        defects: the folder of each test image below `test`; "good" for normal ones.
        masks: the mask of each test image; None for normal ones, and for all where there is no `ground_truth`.
    """

    name: str
    train: ImageFolder
    test: ImageFolder
    defects: tuple[str, ...]
    masks: tuple[pathlib.Path | None, ...]

    @property
    def labels(self) -> np.ndarray:
        """bool [test images]: true for anomalies."""
        return np.array([defect != GOOD for defect in self.defects])

    @property
    def has_masks(self) -> bool:
        """Whether the defects' pixels are known."""
        return any(mask is not None for mask in self.masks)

    def read_masks(self, size: tuple[int, int]) -> np.ndarray:
        """Reads the masks of all test images, true on defects; normal images have none.

        Args:
            size: height and width; the nearest pixel is taken.

        Returns:
            bool [test images, height, width].

        Raises:
            DataError: a mask cannot be read, or there are none.
        """
        if not self.has_masks:
            raise DataError(f"{self.name}: has no folder `ground_truth` with masks.")
        found = np.zeros((len(self.masks), *size), bool)
        for i, path in enumerate(self.masks):
            if path is not None:
                mask = read_image(path)[..., 0] > 127
                rows, columns = (np.arange(n) * m // n for n, m in zip(size, mask.shape, strict=True))
                found[i] = mask[rows][:, columns]
        return found


def is_anomaly_folder(root: str | os.PathLike[str]) -> bool:
    """Tells whether a folder is a category: it has `train/good` and `test`.

    Args:
        root: the folder.
    """
    folder = pathlib.Path(root)
    return (folder / "train" / GOOD).is_dir() and (folder / "test").is_dir()


def anomaly_categories(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Returns the names of the categories in a folder of several, sorted; empty if there is none.

    Args:
        root: the folder.
    """
    folder = pathlib.Path(root)
    return tuple(sorted(p.name for p in folder.iterdir() if is_anomaly_folder(p))) if folder.is_dir() else ()


def load_anomaly_folder(
    root: str | os.PathLike[str], category: str | None = None, *, size: tuple[int, int] | None = None
) -> AnomalyFolder:
    """Finds the images of one category; MVTec AD, VisA in its converted form, and your own data in the same layout.

        root/category/train/good/*.png
        root/category/test/good/*.png
        root/category/test/<defect>/*.png
        root/category/ground_truth/<defect>/<image's name>_mask.png

    Args:
        root: the folder of categories, or of the category itself.
        category: which one; None if `root` is the category.
        size: height and width that images are resized to; their own if None.

    Returns:
        The category. Masks may have any image format, with or without `_mask`; they are optional altogether.

    Raises:
        DataError: a folder or an image is missing, or some defects have masks and others have none.

    Example:
        >>> from subspace_jax.data import load_anomaly_folder
        >>> bottle = load_anomaly_folder("mvtec/", "bottle", size=(448, 448))  # doctest: +SKIP
        >>> sorted(set(bottle.defects))  # doctest: +SKIP
        ['broken_large', 'broken_small', 'contamination', 'good']
    """
    folder = pathlib.Path(root) if category is None else pathlib.Path(root) / category
    if not is_anomaly_folder(folder):
        near = anomaly_categories(root)
        hint = f"; {root} has the categories {', '.join(near)}" if near else ""
        raise DataError(f"{folder}: expected a folder with `train/good` and `test`{hint}.")
    train, test = load_image_folder(folder / "train" / GOOD, size), load_image_folder(folder / "test", size)
    loose = [name for name in test.names if "/" not in name]
    if loose:
        raise DataError(f"{test.root}: {loose[0]} lies in no folder; expected `test/good` and `test/<defect>`.")
    defects = tuple(name.split("/")[0] for name in test.names)
    return AnomalyFolder(folder.resolve().name, train, test, defects, _masks(folder, test, defects))


def _masks(folder: pathlib.Path, test: ImageFolder, defects: tuple[str, ...]) -> tuple[pathlib.Path | None, ...]:
    truth = folder / "ground_truth"
    if not truth.is_dir():
        return (None,) * len(test)
    known = {p.relative_to(truth).with_suffix("").as_posix(): p for p in images_below(truth)}
    found, missing = [], []
    for name, defect in zip(test.names, defects, strict=True):
        stem = pathlib.PurePosixPath(name).with_suffix("").as_posix()
        mask = None if defect == GOOD else known.get(f"{stem}_mask", known.get(stem))
        if mask is None and defect != GOOD:
            missing.append(name)
        found.append(mask)
    if missing:
        raise DataError(
            f"{truth}: {len(missing)} test images have no mask, the first is {missing[0]}; expected "
            f"{pathlib.PurePosixPath(missing[0]).with_suffix('')}_mask.png. Without `ground_truth` no masks are used."
        )
    return tuple(found)
