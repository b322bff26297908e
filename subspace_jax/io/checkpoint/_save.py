"""Saves and restores single checkpoints, one call each."""

from __future__ import annotations

import os
from typing import Any

from subspace_jax.core import OptState, Params, PyTree
from subspace_jax.io.checkpoint._checkpointer import Checkpointer
from subspace_jax.io.checkpoint._state import Checkpoint


def save_checkpoint(
    directory: str | os.PathLike[str],
    step: int,
    adapted: Params,
    *,
    opt_state: OptState = None,
    extra: Any = None,
    base: Params = None,
    max_to_keep: int | None = None,
) -> None:
    """Saves one checkpoint, atomically; a loop that saves often keeps a `Checkpointer` open instead.

    Args:
      directory: the run's folder; made if missing.
      step: a non-negative integer above every step saved there before.
      adapted: the tree with its stand-in weights.
      opt_state: the optimizer's state.
      extra: random keys, the position in the data, Python values.
      base: the parameters that `adapt` was given, to leave out what equals them bit for bit.
      max_to_keep: how many of the latest checkpoints to keep; all if None.

    Raises:
      CheckpointError: the step is not new, or something cannot be saved; nothing is written then.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> optimizer = optax.adam(1e-3)
      >>> state = optimizer.init(sj.partition(adapted)[0])
      >>> folder = tempfile.mkdtemp()
      >>> save_checkpoint(folder, 7, adapted, opt_state=state, extra={"key": jax.random.key(1)})
      >>> restored = restore_checkpoint(folder, like=state)
      >>> restored.step, restored.adapted["w"].method, latest_step(folder)
      (7, 'lora', 7)
    """
    with Checkpointer(directory, max_to_keep=max_to_keep, base=base) as checkpointer:
        checkpointer.save(step, adapted, opt_state=opt_state, extra=extra)


def restore_checkpoint(
    directory: str | os.PathLike[str],
    step: int | None = None,
    *,
    like: PyTree = None,
    shardings: PyTree = None,
    base: Params = None,
) -> Checkpoint:
    """Restores one checkpoint; see `Checkpointer.restore`.

    Args:
      directory: the run's folder.
      step: which one; the latest if None.
      like: `optimizer.init(trainable)`, concrete or abstract; None leaves the optimizer's state out.
      shardings: where the arrays of the adapted tree go.
      base: the parameters that the checkpoint was saved with, if it was.

    Returns:
      A `Checkpoint` with step, adapted tree and extra, bit for bit as they were saved, and the optimizer's state where
      `like` is given, else None.

    Raises:
      CheckpointError: there is none, it is damaged, or the arguments do not fit it.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> folder = tempfile.mkdtemp()
      >>> save_checkpoint(folder, 3, adapted, extra={"batch": 40})
      >>> restored = restore_checkpoint(folder)
      >>> restored.step, restored.extra, bool((restored.adapted["w"].a == adapted["w"].a).all())
      (3, {'batch': 40}, True)
    """
    with Checkpointer(directory, base=base, read_only=True) as checkpointer:
        return checkpointer.restore(step, like=like, shardings=shardings)


def abstract_checkpoint(directory: str | os.PathLike[str], step: int | None = None) -> Checkpoint:
    """Returns one checkpoint with `jax.ShapeDtypeStruct` for arrays: what shardings are computed from.

    Args:
      directory: the run's folder.
      step: which one; the latest if None.

    Returns:
      A `Checkpoint` with the step, and the adapted tree and extra without numbers; its `opt_state` is None.

    Raises:
      CheckpointError: there is none, or its manifest is damaged.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> folder = tempfile.mkdtemp()
      >>> save_checkpoint(folder, 3, adapted)
      >>> abstract_checkpoint(folder).adapted["w"].a
      ShapeDtypeStruct(shape=(6, 2), dtype=float32)
    """
    with Checkpointer(directory, read_only=True) as checkpointer:
        return checkpointer.abstract(step)


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """Returns the highest step saved in a run's folder; None if there is none or no folder."""
    if "://" not in os.fspath(directory) and not os.path.isdir(directory):
        return None
    with Checkpointer(directory, read_only=True) as checkpointer:
        return checkpointer.latest_step()
