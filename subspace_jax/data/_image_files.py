"""Reads a user's images: any suffix's case, EXIF turned, 16 bits scaled, other color forms converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ._errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def list_images(folder: str | Path) -> list[Path]:
    """Returns the image files of a folder and of all folders in it, by name.

    Args:
        folder: to look in; hidden files and files of other kinds are passed over.

    Raises:
        DataError: the folder is missing, or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder.")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise DataError(f"{folder}: there is no image in it; read are {', '.join(SUFFIXES)}, in any case.")
    return found


def read_image(path: str | Path) -> np.ndarray:
    """Reads an image as it is meant to be seen.

    Args:
        path: the file. The first frame of an animation is read; a turn that EXIF asks for is made; 16 bits are
            scaled to 8; gray, palette and CMYK become RGB; transparent places become white.

    Returns:
        uint8 `[height, width, 3]`.

    Raises:
        DataError: the file cannot be read as an image.
        ImportError: pillow is not installed.

    Example:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "gray.PNG"
        >>> Image.new("L", (4, 2), 7).save(file)
        >>> read_image(file).shape
        (2, 4, 3)
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            "images need the 'pillow' package; install it with: pip install 'subspace-jax[cli]'"
        ) from error
    try:
        with Image.open(path) as opened:
            opened.seek(0)
            # Turned by its own copy of the pixels, whatever their form.
            return _rgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image: {error}") from error


def _rgb(image: Any) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _scaled(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"), np.uint8)


def _scaled(pixels: np.ndarray) -> np.ndarray:
    """Gray of more than 8 bits by its own format's range: 16 bits, or 0 to 1 of floats."""
    values = pixels.astype(np.float64)
    top = 1.0 if np.issubdtype(pixels.dtype, np.floating) and values.max(initial=0.0) <= 1.0 else 65535.0
    gray = np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=-1)


def square_image(pixels: np.ndarray, side: int) -> np.ndarray:
    """Scales the shorter side of an image to a length and cuts out the middle square.

    Args:
        pixels: uint8 `[height, width, 3]`.
        side: of the square, in pixels.

    Returns:
        uint8 `[side, side, 3]`.
    """
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(Image.fromarray(pixels), (side, side), Image.Resampling.BICUBIC)
    return np.asarray(fitted, np.uint8)
