"""What a stream is made of: tasks, a model with a head for each, and settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj


@dataclasses.dataclass(frozen=True)
class StreamData:
    """Tasks with what learns them.

    Attributes:
      names: of the tasks.
      splits: of every task the arrays of "train", "validation" and "test", with `labels` that count from zero in each
        task.
      logits: `logits(params, batch)`, `[batch, tasks, classes]`: the logits of the heads of all tasks; large negative
        ones where a task has fewer classes.
      start: makes the parameters of a seed: `backbone`, and `heads` of all tasks.
      kernels: glob of the kernels that methods adapt or project.
      outputs: glob of those among them that end an attention block, which are CoSO's.
      mask: name of the entry of a batch that tells real tokens from padding; None where all are real.
    """

    names: tuple[str, ...]
    splits: Sequence[Mapping[str, Mapping[str, np.ndarray]]]
    logits: Callable[[Any, Any], jax.Array]
    start: Callable[[int], Any]
    kernels: str
    outputs: str
    mask: str | None = None

    def own(self, params: Any, batch: Any) -> jax.Array:
        """Returns the logits of the classes of each example's task, `[batch, classes]`."""
        heads = batch["task"][:, None, None]
        return jnp.take_along_axis(self.logits(params, batch), heads, axis=1)[:, 0]

    @functools.cached_property
    def roles(self) -> Mapping[str, sj.Role]:
        """How the model uses its arrays."""
        example = {name: values[:2] for name, values in self.splits[0]["train"].items()}
        return sj.roles(self.own, self.start(0), {**example, "task": np.zeros(2, np.int32)})


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """Settings of a stream.

    Attributes:
      methods: of METHODS; all of them if empty.
      seeds: one order of tasks and one run of every method per seed.
      tuning_seeds: of the streams by which rates are chosen.
      tuning_tasks: length of those.
      steps: optimizer steps of each task.
      batch_size: examples of a step.
      temperature: logits are divided by it in the loss.
      head_rate: peak learning rate of the heads.
      rank: of each LoRA, and of each task's O-LoRA.
      threshold: share of the inputs' energy that GPM keeps.
      columns: share of the input dimensions that GPM has room for.
      r1: rank of CoSO's subspaces.
      r2: rank of CoSO's sketches.
      gap: steps from one of CoSO's subspaces to the next.
      calibration: batches of a task that are read at its end by GPM, and by OSF for importance.
      rounds: steps by which costs are measured, of every method in turn.
    """

    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (100,)
    tuning_tasks: int = 3
    steps: int = 150
    batch_size: int = 8
    temperature: float = 3.0
    head_rate: float = 1e-2
    rank: int = 8
    threshold: float = 0.9
    columns: float = 0.5
    r1: int = 25
    r2: int = 60
    gap: int = 1
    calibration: int = 16
    rounds: int = 10
