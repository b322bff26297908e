"""Images that a table names, and how any image becomes a square."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from subspace_jax.data import DataError, Rows, check_form, find_form, read_image, read_rows, unused_columns

from ._console import track

FORM = "images"


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with their labels.

    Attributes:
      names: of each: its file in a folder, or its row in a table.
      labels: of each.
      pixels: uint8 squares.
      ignored: columns of a table that nothing needs.
    """

    names: Sequence[Any]
    labels: Sequence[Any]
    pixels: Sequence[np.ndarray]
    ignored: tuple[str, ...] = ()


def read_image_list(path: Path, columns: Mapping[str, str], side: int) -> tuple[Rows, Images]:
    """Reads a table whose rows name an image, as seen from the table's folder, and its label.

    Args:
      path: JSON lines, CSV or Parquet.
      columns: names of the columns `image` and `label` where they are called otherwise.
      side: of the squares.

    Raises:
      DataError: rows without these columns, or images that cannot be read; each is named.
    """
    rows = read_rows(path)
    needed = {columns.get(name, name) for name in ("image", "label")}
    # Other columns of a list say nothing of its form: a caption, say.
    shown = dataclasses.replace(rows, records=tuple({k: r[k] for k in r if k in needed} for r in rows.records))
    named = {ours: theirs for ours, theirs in columns.items() if ours in ("image", "label")}
    lacking = [rows.where(i) for i, record in enumerate(shown.records) if len(record) < len(needed)]
    if lacking:
        wanted = " and ".join(repr(columns.get(name, name)) for name in ("image", "label"))
        raise DataError(
            f"{rows.source}: {len(lacking)} rows lack {wanted}, the columns are {', '.join(rows.columns())}. Give "
            "such a list, or a folder of images with a folder for each class. The rows:",
            lacking,
        )
    find_form(shown, named)
    fields = check_form(shown, FORM, named)
    files = [path.parent / one["image"] for one in fields]
    where = [f"{rows.where(i)}: " for i in range(len(rows))]
    pixels = read_squares(files, where, side, rows.source)
    labels = [one["label"] for one in fields]
    return rows, Images(list(rows.numbers), labels, pixels, unused_columns(rows, FORM, named))


def read_squares(files: Sequence[Path], where: Sequence[str], side: int, source: str) -> list[np.ndarray]:
    """Returns the middle squares of images; all that cannot be read are named at once.

    Args:
      files: of the images.
      where: what stands before the name of each in a message.
      side: of the squares, in pixels.
      source: what messages call all of them.

    Raises:
      DataError: some cannot be read.
    """
    pixels, bad = [], []
    for file, place in zip(track(files, f"reading {Path(source).name}"), where, strict=True):
        if not file.is_file():
            bad.append(f"{place}{file}: there is no such file")
            continue
        try:
            pixels.append(middle_square(read_image(file), side))
        except DataError as error:
            bad.append(f"{place}{error}")
    if bad:
        raise DataError(f"{source}: {len(bad)} images cannot be used; mend or remove them:", bad)
    return pixels


def middle_square(pixels: np.ndarray, side: int) -> np.ndarray:
    """Scales the shorter side of an image to a length and cuts out the middle square.

    Args:
      pixels: uint8 `[height, width, 3]`.
      side: of the square, in pixels.
    """
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.BICUBIC)
    return np.asarray(fitted, np.uint8)
