"""Joins a file that several carriers hold in parts."""

from __future__ import annotations

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Sequence

from ._fetch import FetchError
from ._find import cache_folder, find_files


def join_parts(
    names: Sequence[str],
    suffix: str,
    filename: str,
    sha256: str,
    *,
    cache: str | os.PathLike[str] | None = None,
) -> pathlib.Path:
    """Returns the whole file of parts that several assets carry; joined once, checked, and kept in the cache.

    Args:
        names: the assets, in the order of their parts.
        suffix: end of the name of a part's file, with `{}` for the number of the part, from zero: `.part{:02}`.
        filename: of the whole, in the cache folder.
        sha256: of the whole; the joined file appears only if it has it.
        cache: see `cache_folder`.

    Raises:
        AssetMissingError: a part is not here.
        FetchError: the whole has another hash.
    """
    whole = cache_folder(cache) / filename
    if whole.exists():
        return whole
    parts = [find_files(name, suffix.format(index), cache=cache)[0] for index, name in enumerate(names)]
    whole.parent.mkdir(parents=True, exist_ok=True)
    total = hashlib.sha256()
    handle, temporary = tempfile.mkstemp(dir=whole.parent, prefix=f".{whole.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            for part in parts:
                with part.open("rb") as file:
                    while block := file.read(1 << 20):
                        total.update(block)
                        out.write(block)
        if total.hexdigest() != sha256:
            raise FetchError(f"{filename}: the joined parts have SHA-256 {total.hexdigest()}; expected {sha256}.")
        os.replace(temporary, whole)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)
    return whole
