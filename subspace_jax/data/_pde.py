"""Solutions of partial differential equations from `neuraloperator`: Darcy flow and Burgers' equation."""

import collections
import io
import math
import pathlib
import pickle
import zipfile
from collections.abc import Iterator

import numpy as np

from subspace_jax.assets import find_file
from subspace_jax.data._records import OperatorRecord

_STORAGE_DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "BoolStorage": np.bool_,
}


def _rebuild(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_) -> np.ndarray:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride), default=0) < 0 or (math.prod(size) and last >= len(storage)):
        raise pickle.UnpicklingError(f"shape {size} with strides {stride} leaves a storage of {len(storage)}")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides).copy()


class _TensorUnpickler(pickle.Unpickler):
    """Knows dense tensors and the containers around them; refuses every other name before it is looked up."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGE_DTYPES:
            return name
        raise pickle.UnpicklingError(f"refused {module}.{name}: only dense tensors are read")

    def persistent_load(self, pid) -> np.ndarray:
        kind, storage, key = pid[:3]
        if kind != "storage" or storage not in _STORAGE_DTYPES or not str(key).isdigit():
            raise pickle.UnpicklingError(f"refused the stored object {pid!r}: only dense tensors are read")
        return np.frombuffer(self._archive.read(f"{self._root}/data/{key}"), _STORAGE_DTYPES[storage])


def read_tensors(path: pathlib.Path):
    """Reads dense tensors from a zipped `.pt` file without PyTorch and without running anything in it.

    Args:
        path: the file.

    Returns:
        What was saved, with numpy arrays in place of tensors.

    Raises:
        ValueError: the file is not of this kind, or holds anything besides dense tensors in plain containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
            return _TensorUnpickler(archive, root).load()
    except (pickle.PickleError, zipfile.BadZipFile, LookupError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: cannot be read as a file of tensors: {error}") from error


def _pairs(file: str, inputs: str, outputs: str, split: str | None) -> Iterator[OperatorRecord]:
    stored = read_tensors(find_file("neuraloperator", f"/datasets/data/{file}.pt"))
    for x, y in zip(stored[inputs], stored[outputs], strict=True):
        yield OperatorRecord(x.astype(np.float32), y.astype(np.float32), split)


def darcy16() -> Iterator[OperatorRecord]:
    """Yields Darcy flow on a 16x16 grid: a two-valued permeability and the pressure."""
    yield from _pairs("darcy_train_16", "x", "y", "train")
    yield from _pairs("darcy_test_16", "x", "y", "test")


def darcy32() -> Iterator[OperatorRecord]:
    """Yields Darcy flow on a 32x32 grid, a test split only: for transfer from 16x16 to a finer grid."""
    return _pairs("darcy_test_32", "x", "y", "test")


def burgers() -> Iterator[OperatorRecord]:
    """Yields Burgers' equation, viscosity 0.01: 16 initial values and the solution at 17 times."""
    return _pairs("burgers_lowres", "input", "output", None)
