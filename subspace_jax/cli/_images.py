"""A user's folder of images as examples of a classification."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from subspace_jax.data import DataError, Rows, check_classes, load_image_folder, read_image, split_rows

from ._backbone import Backbone
from ._console import track
from ._errors import UserError
from ._examples import Examples, Prepared
from ._options import FinetuneOptions

SPLITS = ("train", "validation")


def prepare_images(options: FinetuneOptions, backbone: Backbone) -> Prepared:
    """Reads a folder with one folder of images for each class, under `train/` and `validation/` where these exist.

    Raises:
      UserError: the model reads no images, or the data is no folder.
      DataError: images that cannot be read, or classes that cannot be learned.
    """
    if backbone.kind != "image encoder":
        raise UserError(
            f"{options.data}: a folder of images trains an image encoder, and --model {backbone.name} is a "
            f"{backbone.kind}. Name vit-s14, or a file of rows."
        )
    if not options.data.is_dir():
        raise UserError(
            f"{options.data}: --model {backbone.name} reads images; expected a folder with a folder for each class."
        )
    patch = backbone.model.config.patch_size
    if options.image_size % patch:
        raise UserError(f"--image-size {options.image_size}: expected a multiple of the model's patches of {patch}.")
    if options.validation is not None:
        raise UserError("--validation: of images, put the folders train/ and validation/ into the data's folder.")
    given = all((options.data / name).is_dir() for name in SPLITS)
    folders = [options.data / name for name in SPLITS] if given else [options.data]
    parts = [_read(folder, options.image_size) for folder in folders]
    rows = Rows(tuple({"file": f} for f in parts[0][0]), tuple(range(1, len(parts[0][0]) + 1)), str(folders[0]))
    classes = check_classes(rows, parts[0][1], parts[1][1] if given else ())
    if given:
        held, train, valid = parts[1], range(len(parts[0][0])), range(len(parts[1][0]))
    else:
        pixels = [hashlib.sha256(image.tobytes()).hexdigest() for image in parts[0][2]]
        found = split_rows(pixels, options.validation_fraction, labels=parts[0][1], seed=options.seed)
        held, train, valid = parts[0], found.train, found.validation
    report: dict[str, Any] = {
        "source": str(options.data),
        "form": "images",
        "rows": sum(len(part[0]) for part in parts),
        "classes": list(classes),
        "image_size": options.image_size,
        "train_numbers": [parts[0][0][i] for i in train],
        "validation_numbers": [held[0][i] for i in valid],
    }
    return Prepared(
        "images", _examples(parts[0], train, classes), _examples(held, valid, classes), classes, None, report
    )


def read_image_examples(folder: Path, side: int, classes: tuple[Any, ...]) -> Examples:
    """Returns all images of a folder with a folder for each class.

    Args:
      folder: of the images.
      side: of the squares that training has seen.
      classes: in the order of the logits.

    Raises:
      DataError: images that cannot be read, or of classes that training did not have.
    """
    part = _read(folder, side)
    strange = sorted(set(part[1]) - set(classes))
    if strange:
        raise DataError(f"{folder}: folders that are no class of the training data ({', '.join(classes)}):", strange)
    return _examples(part, range(len(part[0])), classes)


_Images = tuple[list[str], list[str], list[np.ndarray]]


def _read(folder: Path, side: int) -> _Images:
    """Names, classes and pixels of a folder's images; all that cannot be read are named at once."""
    files = load_image_folder(folder).paths
    stray = [str(file) for file in files if len(file.relative_to(folder).parts) < 2]
    if stray:
        raise DataError(f"{folder}: images outside the folders of classes:", stray)
    pixels, bad = [], []
    for file in track(files, f"reading {folder.name}/"):
        try:
            pixels.append(middle_square(read_image(file), side))
        except DataError as error:
            bad.append(str(error))
    if bad:
        raise DataError(f"{folder}: {len(bad)} images cannot be used; mend or remove them:", bad)
    names = [str(file.relative_to(folder)) for file in files]
    return names, [file.relative_to(folder).parts[0] for file in files], pixels


def _examples(part: _Images, index: Sequence[int], classes: tuple[Any, ...]) -> Examples:
    names, labels, pixels = part
    numbers = {label: number for number, label in enumerate(classes)}
    arrays = {
        "images": np.stack([pixels[i] for i in index]),
        "labels": np.array([numbers[labels[i]] for i in index], np.int32),
        "counts": np.ones(len(index), bool),
    }
    details = tuple({"row": names[i], "label": labels[i]} for i in index)
    return Examples(arrays, tuple((i + 1,) for i in index), details)


def middle_square(pixels: np.ndarray, side: int) -> np.ndarray:
    """Scales the shorter side of an image to a length and cuts out the middle square.

    Args:
      pixels: uint8 `[height, width, 3]`.
      side: of the square, in pixels.
    """
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.BICUBIC)
    return np.asarray(fitted, np.uint8)
