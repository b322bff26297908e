"""Tensors of a folder of safetensors files, whole or in shards, read one at a time."""

from __future__ import annotations

import json
import math
import os
import pathlib

import numpy as np

from subspace_jax.io._errors import AdapterFileError, listing
from subspace_jax.io._safetensors import TensorEntry, open_checked, read_header

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorFiles:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Headers are read and checked when the object is made, tensors when they are asked for.

    Args:
      folder: that holds the files.

    Attributes:
      shapes: of every tensor, by name.

    Raises:
      AdapterFileError: there is no file, a shard is missing, damaged or stale, or the index names other tensors.

    Example:
      >>> import pathlib, tempfile, numpy as np
      >>> from subspace_jax.io import write_safetensors
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> write_safetensors(folder / "model.safetensors", {"w": np.ones((2, 3), np.float16)}, {})
      >>> TensorFiles(folder).read("w").dtype.name
      'float16'
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = pathlib.Path(folder)
        files = self._files()
        self._entries: dict[str, tuple[pathlib.Path, TensorEntry]] = {}
        for file, names in files.items():
            with open_checked(file) as opened:
                entries, _ = read_header(opened, file)
            missing = sorted((names or set()) - entries.keys())
            extra = sorted(entries.keys() - names) if names is not None else []
            if missing or extra:
                raise AdapterFileError(
                    f"{file}: the index says otherwise: missing {missing[:3]}, not named {extra[:3]}. The shards are "
                    "of two versions; fetch the folder again."
                )
            self._entries |= {name: (file, entry) for name, entry in entries.items()}
        self.shapes = {name: entry.shape for name, (_, entry) in self._entries.items()}

    def _files(self) -> dict[pathlib.Path, set[str] | None]:
        """The files, and which tensors each should hold; None where no index says it."""
        whole, index = self.folder / WHOLE, self.folder / INDEX
        if whole.exists():
            return {whole: None}
        if not index.exists():
            raise AdapterFileError(f"{self.folder}: holds neither {WHOLE} nor {INDEX}; is this a model's folder?")
        try:
            placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AdapterFileError(f"{index}: no readable index of shards: {error!r}") from error
        found: dict[pathlib.Path, set[str]] = {}
        for name, file in placed.items():
            # A file's name comes from outside: it must stay in the folder.
            if not isinstance(file, str) or pathlib.PurePath(file).name != file:
                raise AdapterFileError(f"{index}: tensor {name!r} is in {file!r}, which is no name of a file here.")
            found.setdefault(self.folder / file, set()).add(name)
        absent = [file.name for file in found if not file.exists()]
        if absent:
            raise AdapterFileError(f"{self.folder}: of {len(found)} shards these are missing:{listing(absent)}")
        return dict(found)

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, in the dtype of its file.

        Args:
          name: of the tensor.

        Raises:
          KeyError: there is no tensor of this name.
          AdapterFileError: the file cannot be read, or was cut since the object was made.
        """
        file, entry = self._entries[name]
        count = math.prod(entry.shape) * entry.dtype.itemsize
        with open_checked(file) as opened:
            opened.seek(entry.start)
            data = np.fromfile(opened, np.uint8, count)
        if data.size != count:
            raise AdapterFileError(f"{file}: the file was cut while it was read, at tensor {name!r}.")
        return data.view(entry.dtype).reshape(entry.shape)
