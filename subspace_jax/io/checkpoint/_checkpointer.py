"""Checkpoints of a training run: Orbax writes and commits the arrays, a manifest beside them describes the tree."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from subspace_jax.core import OptState, Params, PyTree
from subspace_jax.io._array import ArraySpec
from subspace_jax.io._base import BaseArrays
from subspace_jax.io._errors import CheckpointError, ManifestError
from subspace_jax.io.checkpoint._state import (
    Checkpoint,
    check_base,
    check_manifest,
    check_step,
    check_template,
    compare_stored,
    pack,
    placeable_arrays,
    placements,
    template_placements,
    unpack,
    unpack_abstract,
    wanted_arrays,
)

# Orbax takes over a second to import, so it is imported only where it is used.


class Checkpointer:
    """Saves and restores the checkpoints of one run in one folder; a thin layer over Orbax's checkpoint manager.

    A checkpoint appears whole or not at all: Orbax writes into a temporary folder and renames it at the end. Use it
    as a context manager, or call `close`.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> with Checkpointer(tempfile.mkdtemp(), max_to_keep=1) as checkpointer:
      ...     for step in (10, 20):
      ...         checkpointer.save(step, adapted)
      ...     steps, restored = checkpointer.all_steps(), checkpointer.restore()
      >>> steps, restored.adapted["w"].a.shape
      ([20], (6, 2))
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int | None = None,
        base: Params = None,
        background: bool = False,
        read_only: bool = False,
    ) -> None:
        """Opens a folder of checkpoints.

        Args:
          directory: the folder; made if missing.
          max_to_keep: how many of the latest checkpoints to keep; all if None.
          base: the parameters that `adapt` was given. Frozen arrays whose bytes equal theirs are left out of the
            checkpoints and taken from here when restoring, their hashes compared.
          background: return from `save` once the arrays are copied, and write them in another thread.
          read_only: never write; the folder must exist.

        Raises:
          CheckpointError: the folder is missing though `read_only`, or cannot be made.
        """
        import orbax.checkpoint as ocp

        self._ocp = ocp
        text = os.fspath(directory)
        self.directory = text if "://" in text else os.path.abspath(text)
        if read_only and "://" not in text and not os.path.isdir(self.directory):
            raise CheckpointError(f"{self.directory}: there is no such folder of checkpoints.")
        try:
            self._base = BaseArrays(base)
        except ManifestError as error:
            raise CheckpointError(f"base=: {error}") from error
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            enable_async_checkpointing=background,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        handlers = {"arrays": ocp.PyTreeCheckpointHandler(), "manifest": ocp.JsonCheckpointHandler()}
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        except OSError as error:
            raise CheckpointError(f"{self.directory}: cannot hold checkpoints: {error}") from error

    def save(self, step: int, adapted: Params, *, opt_state: OptState = None, extra: Any = None) -> None:
        """Saves a checkpoint.

        Args:
          step: a non-negative integer above every step saved before.
          adapted: the tree with its stand-in weights.
          opt_state: the optimizer's state, any pytree of arrays.
          extra: dicts, lists, tuples, arrays, random keys and Python values, such as the position in the data.

        Raises:
          CheckpointError: the step is not new, or something cannot be saved; nothing is written then.
        """
        try:
            manifest, arrays = pack(Checkpoint(step, adapted, opt_state, extra), self._base)
        except ManifestError as error:
            raise CheckpointError(f"{self.directory}: step {step} was not saved: {error}") from error
        latest = self.latest_step()
        if latest is not None and manifest["step"] <= latest:
            raise CheckpointError(
                f"{self.directory}: step {step} is not above the latest saved step {latest}. Restore that one and go "
                "on from it, or save into another folder."
            )
        items: dict[str, Any] = {"manifest": self._ocp.args.JsonSave(manifest)}
        if arrays:
            items["arrays"] = self._ocp.args.PyTreeSave(arrays)
        saved = self._manager.save(manifest["step"], args=self._ocp.args.Composite(**items), force=True)
        if not saved:
            raise CheckpointError(f"{self.directory}: step {step} was not saved: Orbax declined it.")

    def restore(self, step: int | None = None, *, like: PyTree = None, shardings: PyTree = None) -> Checkpoint:
        """Returns a checkpoint; the adapted tree is rebuilt from the manifest alone.

        Args:
          step: which one; the latest if None.
          like: `optimizer.init(trainable)`, concrete or abstract, for the containers of the optimizer's state. Its
            leaves must be those that were saved; leaves placed on devices on purpose are restored there. Without it
            the optimizer's state is not read.
          shardings: a tree of the adapted tree's structure with shardings (None for the default device), or one
            sharding for all of its arrays. `abstract` gives the tree to compute them from.

        Returns:
          The checkpoint, bit for bit as it was saved.

        Raises:
          CheckpointError: there is none, it is damaged, an array is missing, extra or of another shape or dtype, or
            `like`, `shardings` or the base do not fit it.
        """
        number, manifest = self._manifest(step)
        try:
            if like is not None:
                check_template(manifest, like)
            wanted = wanted_arrays(manifest, with_opt_state=like is not None)
            placed = placements(shardings, placeable_arrays(manifest, wanted))
            places = {f"adapted/{path}": sharding for path, sharding in placed.items()}
            places |= {f"opt_state/{path}": s for path, s in template_placements(like).items()}
            check_base(manifest, self._base)
            compare_stored(manifest, self._stored(number))
            return unpack(manifest, self._read(number, wanted, places), like, self._base, places)
        except ManifestError as error:
            raise self._error(number, error) from error

    def abstract(self, step: int | None = None) -> Checkpoint:
        """Returns a checkpoint with `jax.ShapeDtypeStruct` in place of arrays, and without the optimizer's state.

        Args:
          step: which one; the latest if None.

        Raises:
          CheckpointError: there is none, or its manifest is damaged.
        """
        number, manifest = self._manifest(step)
        try:
            return unpack_abstract(manifest)
        except ManifestError as error:
            raise self._error(number, error) from error

    def latest_step(self) -> int | None:
        """Returns the highest step saved, or None."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Returns the saved steps, ascending."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Waits until what is written in the background is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending writes and ends the background threads."""
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()

    def _error(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.directory}, step {step}: {error}")

    def _manifest(self, step: int | None) -> tuple[int, dict[str, Any]]:
        known = self.all_steps()
        try:
            number = (known[-1] if known else None) if step is None else check_step(step)
        except ManifestError as error:
            raise CheckpointError(f"{self.directory}: {error}") from error
        if number is None or number not in known:
            what = "no checkpoint" if number is None else f"no checkpoint of step {number}"
            raise CheckpointError(f"{self.directory}: there is {what}; it holds steps {known or 'none'}.")
        try:
            items = self._manager.restore(number, args=self._ocp.args.Composite(manifest=self._ocp.args.JsonRestore()))
        except Exception as error:  # Orbax raises whatever its parts raise
            raise CheckpointError(
                f"{self.directory}, step {number}: the manifest cannot be read ({_first_line(error)}). The checkpoint "
                "is damaged, or was not written by this library."
            ) from error
        try:
            check_manifest(items["manifest"])
        except ManifestError as error:
            raise self._error(number, error) from error
        return number, items["manifest"]

    def _stored(self, step: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of what the checkpoint holds, as its files say it."""
        try:
            items = self._manager.item_metadata(step)
            found = items["arrays"] if "arrays" in items.keys() else None  # noqa: SIM118  (no mapping)
        except Exception as error:  # Orbax raises whatever its parts raise
            raise CheckpointError(
                f"{self.directory}, step {step}: the list of arrays cannot be read ({_first_line(error)}). The "
                "checkpoint is damaged; restore an earlier step."
            ) from error
        tree = getattr(found, "tree", found) or {}
        return {name: (leaf.shape, leaf.dtype) for name, leaf in tree.items()}

    def _read(self, step: int, wanted: Mapping[str, ArraySpec], places: Mapping[str, Any]) -> dict[str, Any]:
        if not wanted:
            return {}
        ocp = self._ocp
        how = {
            name: ocp.ArrayRestoreArgs(sharding=places[name])
            if name in places
            else ocp.RestoreArgs(restore_type=np.ndarray)
            for name in wanted
        }
        template = dict.fromkeys(wanted, 0)
        arguments = ocp.args.PyTreeRestore(item=template, restore_args=how, partial_restore=True)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(arrays=arguments))["arrays"]
        except Exception as error:  # Orbax raises whatever its parts raise
            raise CheckpointError(
                f"{self.directory}, step {step}: the arrays cannot be read ({_first_line(error)}). The checkpoint is "
                "damaged; restore an earlier step."
            ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
