"""What a step of each method costs: bytes, operations, and time, with the methods taken in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import subspace_jax as sj
from experiments.tasks.streams._batches import own
from experiments.tasks.streams._data import StreamConfig, StreamData


def costs(
    data: StreamData, config: StreamConfig, learners: Mapping[tuple[str, float], sj.continual.Learner]
) -> list[dict[str, Any]]:
    """Returns bytes, operations and times of a step of every method, on the state of the first task.

    Args:
      data: tasks and model.
      config: settings.
      learners: by method and learning rate.
    """
    made = [(method, *_timed(data, config, learner)) for (method, _), learner in learners.items()]
    times: dict[str, list[float]] = {method: [] for method, *_ in made}
    for _ in range(config.rounds):
        for method, step, _ in made:
            times[method].append(step())
    return [
        {"method": method, **figures, "step_seconds": statistics.median(times[method])} for method, _, figures in made
    ]


def _timed(
    data: StreamData, config: StreamConfig, learner: sj.continual.Learner
) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that takes a step and returns its seconds, and figures of the compiled step."""
    key = jax.random.key(0)
    state = learner.init(data.start(0), key)
    resting = sum(v.nbytes for v in jax.tree.leaves(state))
    state = learner.start_task(state, 0, key)
    batch = jax.tree.map(jnp.asarray, next(own(data, 0, config.batch_size, 0)))
    compiled = jax.jit(learner.step, donate_argnums=0).lower(state, batch, key).compile()
    figures = {
        "flops": float((compiled.cost_analysis() or {}).get("flops", 0.0)),
        "state_bytes": sum(v.nbytes for v in jax.tree.leaves(state)),
        "resting_bytes": resting,
        "trainable": sj.summary(learner.params(state)).trainable,
    }

    def step() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = compiled(state, batch, key)
        jax.block_until_ready(metrics["loss"])
        return time.perf_counter() - start

    step()  # whatever warms up
    return step, figures
