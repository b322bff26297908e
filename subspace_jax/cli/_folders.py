"""Folders that commands read and write: checked before anything is made, and whole whatever happens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from subspace_jax.data import AnomalyFolder, ImageFolder, unreadable
from subspace_jax.io import replacing

from ._errors import UserError
from ._files import write_json

STATE = "unfinished.json"
ARRAYS = "unfinished.npz"


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """Turns what a reader of files or a missing package says into a user's mistake."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error


def check_images(images: ImageFolder) -> None:
    """Refuses a folder in which a file is no readable image.

    Raises:
      UserError: with a line for each of them.
    """
    lines = unreadable(images.paths)
    if lines:
        raise UserError(
            f"{images.root}: {len(lines)} of {len(images)} files are no images; mend or remove them:", lines
        )


def check_masks(category: AnomalyFolder) -> None:
    """Refuses masks that are no readable images, before hours are spent on what they measure.

    Raises:
      UserError: with a line for each of them.
    """
    lines = unreadable([path for path in category.masks if path is not None])
    if lines:
        raise UserError(f"{category.name}: {len(lines)} masks are no images; mend them, or remove ground_truth:", lines)


def check_out(out: Path, resume: bool) -> None:
    """Refuses an output folder that holds something, unless an unfinished run goes on in it.

    Raises:
      UserError: it does; the message tells how to go on.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a folder for the results.")
    held = out.is_dir() and any(out.iterdir())
    if held and not resume:
        unfinished = (out / STATE).exists()
        mend = "add --resume to go on with it, or give another folder" if unfinished else "give another folder"
        raise UserError(f"{out}: {'holds an unfinished run' if unfinished else 'is not empty'}; {mend}.")
    if held and not (out / STATE).exists():
        raise UserError(f"{out}: holds no unfinished run to resume; leave --resume out and give an empty folder.")


class Unfinished:
    """What a long run has done so far; it goes on from there only with the same inputs and options.

    Args:
      folder: that the results go to.
      job: inputs and options, as JSON has them.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.folder, self.job = folder, json.loads(json.dumps(job))

    def load(self) -> tuple[int, dict[str, np.ndarray]]:
        """Returns how many items are done, and their arrays; nothing of a run that has not begun.

        Raises:
          UserError: the run in the folder had other inputs or options.
        """
        if not (self.folder / STATE).exists():
            return 0, {}
        found = json.loads((self.folder / STATE).read_text(encoding="utf8"))
        if found != self.job:
            keys = [k for k in {**found, **self.job} if found.get(k) != self.job.get(k)]
            raise UserError(
                f"{self.folder}: the unfinished run there has other {', '.join(sorted(keys))}; resume it with its own, "
                "or give another folder."
            )
        if not (self.folder / ARRAYS).exists():
            return 0, {}
        with np.load(self.folder / ARRAYS) as file:
            arrays = {name: file[name] for name in file.files}
        return int(arrays.pop("done")), arrays

    def save(self, done: int, arrays: Mapping[str, Any]) -> None:
        """Writes what is done, in one move."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / STATE).exists():
            write_json(self.folder / STATE, self.job)
        values: dict[str, Any] = {"done": done, **{k: np.asarray(v) for k, v in arrays.items()}}
        with replacing(self.folder / ARRAYS) as temporary, open(temporary, "wb") as file:
            np.savez(file, **values)

    def clear(self) -> None:
        """Removes the notes of a run that is finished."""
        for name in (ARRAYS, STATE):
            (self.folder / name).unlink(missing_ok=True)
