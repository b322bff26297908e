"""A user's images, in a folder or named by a list, as examples of a classification."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from subspace_jax.data import DataError, Rows, check_classes, load_image_folder, split_rows

from ._backbone import Backbone
from ._errors import UserError
from ._examples import Examples, Prepared
from ._image_list import Images, read_image_list, read_squares
from ._options import FinetuneOptions

SPLITS = ("train", "validation")


def prepare_images(options: FinetuneOptions, backbone: Backbone) -> Prepared:
    """Reads a folder with one folder of images for each class, under `train/` and `validation/` where these exist; or
    a list of files.

    Raises:
      UserError: the model reads no images, or an option does not fit.
      DataError: images that cannot be read, or classes that cannot be learned.
    """
    if backbone.kind != "image encoder":
        raise UserError(
            f"{options.data}: images train an image encoder, and --model {backbone.name} is a "
            f"{backbone.kind}. Name vit-s14, or a file of rows."
        )
    patch = backbone.model.config.patch_size
    if options.image_size % patch:
        raise UserError(f"--image-size {options.image_size}: expected a multiple of the model's patches of {patch}.")
    rows, parts = _read_parts(options)
    classes = check_classes(rows, parts[0].labels, parts[1].labels if len(parts) > 1 else ())
    if len(parts) > 1:
        held, train, valid = parts[1], range(len(parts[0].labels)), range(len(parts[1].labels))
    else:
        pixels = [hashlib.sha256(image.tobytes()).hexdigest() for image in parts[0].pixels]
        found = split_rows(pixels, options.validation_fraction, labels=parts[0].labels, seed=options.seed)
        held, train, valid = parts[0], found.train, found.validation
    report: dict[str, Any] = {
        "source": str(options.data),
        "form": "images",
        "rows": sum(len(part.labels) for part in parts),
        "ignored_columns": list(parts[0].ignored),
        "classes": list(classes),
        "image_size": options.image_size,
        "train_numbers": [parts[0].names[i] for i in train],
        "validation_numbers": [held.names[i] for i in valid],
    }
    return Prepared(
        "images", _examples(parts[0], train, classes), _examples(held, valid, classes), classes, None, report
    )


def _read_parts(options: FinetuneOptions) -> tuple[Rows, list[Images]]:
    """The rows of the training images, for messages, and the images: one part, or two where validation is given."""
    columns, side = options.column_names(), options.image_size
    if not options.data.is_dir():
        files = [options.data, *([] if options.validation is None else [options.validation])]
        found = [read_image_list(file, columns, side) for file in files]
        return found[0][0], [part for _, part in found]
    if options.validation is not None:
        raise UserError("--validation: of images, put the folders train/ and validation/ into the data's folder.")
    given = all((options.data / name).is_dir() for name in SPLITS)
    folders = [options.data / name for name in SPLITS] if given else [options.data]
    parts = [_read_folder(folder, side) for folder in folders]
    names = parts[0].names
    return Rows(tuple({"file": f} for f in names), tuple(range(1, len(names) + 1)), str(folders[0])), parts


def read_image_examples(
    data: Path, side: int, classes: tuple[Any, ...], columns: Mapping[str, str] | None = None
) -> Examples:
    """Returns all images of a folder with a folder for each class, or of a list.

    Args:
      data: folder, or table of files and labels.
      side: of the squares that training has seen.
      classes: in the order of the logits.
      columns: names of the table's columns that are called otherwise.

    Raises:
      DataError: images that cannot be read, or of classes that training did not have.
    """
    part = _read_folder(data, side) if data.is_dir() else read_image_list(data, columns or {}, side)[1]
    strange = sorted(map(str, set(part.labels) - set(classes)))
    if strange:
        known = ", ".join(map(str, classes))
        raise DataError(f"{data}: labels that are no class of the training data ({known}):", strange)
    return _examples(part, range(len(part.labels)), classes)


def _read_folder(folder: Path, side: int) -> Images:
    files = load_image_folder(folder).paths
    stray = [str(file) for file in files if len(file.relative_to(folder).parts) < 2]
    if stray:
        raise DataError(f"{folder}: images outside the folders of classes:", stray)
    names = [str(file.relative_to(folder)) for file in files]
    pixels = read_squares(files, [""] * len(files), side, str(folder))
    return Images(names, [file.relative_to(folder).parts[0] for file in files], pixels)


def _examples(part: Images, index: Sequence[int], classes: tuple[Any, ...]) -> Examples:
    numbers = {label: number for number, label in enumerate(classes)}
    arrays = {
        "images": np.stack([part.pixels[i] for i in index]),
        "labels": np.array([numbers[part.labels[i]] for i in index], np.int32),
        "counts": np.ones(len(index), bool),
    }
    details = tuple({"row": part.names[i], "label": part.labels[i]} for i in index)
    return Examples(arrays, tuple((i + 1,) for i in index), details)
