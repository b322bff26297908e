"""Any folder of images on disk, read a few at a time."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ._errors import DataError

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Images below a folder, sorted by name; nothing is read before it is asked for.

    Attributes:
        root: the folder.
        paths: of its images.
        size: height and width that images are resized to, whatever their aspect ratio; their own if None.
    """

    root: pathlib.Path
    paths: tuple[pathlib.Path, ...]
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def names(self) -> tuple[str, ...]:
        """Paths below the root, with `/` between the parts."""
        return tuple(path.relative_to(self.root).as_posix() for path in self.paths)

    def batches(self, batch_size: int, start: int = 0) -> Iterator[np.ndarray]:
        """Reads the images in order.

        Args:
            batch_size: images read at a time.
            start: index of the first one.

        Yields:
            uint8 [at most batch_size, height, width, 3].

        Raises:
            DataError: an image cannot be read, or sizes differ and `size` is None.
        """
        for i in range(start, len(self.paths), batch_size):
            images = [read_image(path, self.size) for path in self.paths[i : i + batch_size]]
            shapes = {image.shape for image in images}
            if len(shapes) > 1:
                raise DataError(f"{self.root}: images of sizes {sorted(shapes)} in one batch; give a size.")
            yield np.stack(images)


def load_image_folder(root: str | os.PathLike[str], size: tuple[int, int] | None = None) -> ImageFolder:
    """Finds all images below a folder: PNG, JPEG, BMP, GIF, TIFF and WebP, in subfolders as well.

    Args:
        root: the folder.
        size: height and width that images are resized to; their own if None.

    Returns:
        The images, sorted by path. Hidden files and folders are left out.

    Raises:
        DataError: it is no folder, or holds no image.

    Example:
        >>> from subspace_jax.data import load_image_folder
        >>> images = load_image_folder("photos/", (448, 448))  # doctest: +SKIP
        >>> next(images.batches(8)).shape  # doctest: +SKIP
        (8, 448, 448, 3)
    """
    folder = pathlib.Path(root)
    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder; give the folder that holds the images.")
    paths = images_below(folder)
    if not paths:
        raise DataError(f"{folder}: holds no image ({', '.join(ENDINGS)}).")
    return ImageFolder(folder, tuple(paths), size)


def images_below(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the image files below a folder, sorted, without hidden ones."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def read_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads an image in color, turned as its camera says; transparent parts become white.

    The first frame of an animation is read, 16 bits are scaled to 8, palettes and CMYK become RGB.

    Args:
        path: of the file.
        size: height and width that it is resized to, bilinear, with averaging where it shrinks.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ImportError: pillow is not installed.
        DataError: the file is no image, or damaged.
    """
    image = _open(path)
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), _pillow().Resampling.BILINEAR)
    return np.asarray(image, np.uint8)


def unreadable(paths: Any) -> list[str]:
    """Returns one line for each file that is no readable image: its path and why.

    Args:
        paths: of the files.
    """
    lines = []
    for path in paths:
        try:
            _open(path)
        except DataError as error:
            lines.append(str(error))
    return lines


def _open(path: str | os.PathLike[str]) -> Any:
    module = _pillow()
    from PIL import ImageOps

    try:
        with module.open(path) as opened:
            opened.seek(0)
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = module.new("RGBA", image.size, "WHITE")
                image = module.alpha_composite(white, image)
            elif image.mode.startswith("I") or image.mode == "F":
                image = _eight_bits(module, image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, module.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image: {error}") from error


def _eight_bits(module: Any, image: Any) -> Any:
    """Gray of more than 8 bits by its full scale where its form says it, else by its largest value."""
    values = np.asarray(image, np.float64)
    largest = values.max(initial=0.0)
    scale = 65535.0 if image.mode.startswith("I;16") or 255 < largest <= 65535 else max(largest, 255.0)
    return module.fromarray(np.clip(values * (255.0 / scale), 0, 255).round().astype(np.uint8))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs pillow: pip install 'subspace-jax[cli]'") from error
    return Image
