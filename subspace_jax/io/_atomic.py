"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Writes a file atomically: a context manager that gives a temporary path and renames it to `path` on success.

    Until then, and whenever the writing fails, what `path` holds is left alone. A killed process leaves at most a
    hidden temporary file.

    Args:
      path: where the file shall be; its folder must exist.

    Example:
      >>> import pathlib, tempfile
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> with replacing(folder / "notes") as temporary:
      ...     _ = temporary.write_text("all of it")
      >>> [file.name for file in folder.iterdir()]
      ['notes']
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        _flush(temporary, os.O_RDWR)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: pathlib.Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: pathlib.Path) -> None:
    # The rename itself survives a power cut only once the folder is on disk; not every system can be asked for that.
    with contextlib.suppress(OSError):
        _flush(folder, os.O_RDONLY)
