"""The training loop that experiments share: the library's own step, timed and logged."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj


@dataclasses.dataclass(frozen=True)
class Trained:
    """The end of a training run.

    Attributes:
      adapted: the tree with its trained stand-in weights.
      losses: loss of every step.
      step_seconds: median time of a step, without compilation.
      state_bytes: bytes of the optimizer's state.
    """

    adapted: Any
    losses: list[float]
    step_seconds: float
    state_bytes: int


class Trainer:
    """Trains with `sj.training.make_train_step`, compiled once for all runs of the same shapes.

    Args:
      loss: `loss(adapted, batch)`, a scalar.
      optimizer: any optax transformation.

    Attributes:
      compile_seconds: what compiling the step took.
      flops: operations of a step, as the compiler counts them.
      memory_bytes: what the compiled step holds at most: its arguments, what it makes, and its temporaries.
    """

    def __init__(self, loss: Callable[[Any, Any], jax.Array], optimizer: optax.GradientTransformation) -> None:
        self._optimizer = optimizer
        self._step = sj.training.make_train_step(lambda adapted, batch, key: loss(adapted, batch), optimizer)
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0
        self.flops = 0.0
        self.memory_bytes = 0

    def run(
        self,
        adapted: Any,
        batches: Iterable[Any],
        on_step: Callable[[float, float], None] = lambda loss, seconds: None,
        **hyperparams: float,
    ) -> Trained:
        """Runs one step per batch.

        Args:
          adapted: tree with stand-in weights.
          batches: batches of one shape.
          on_step: told loss and seconds after every step.
          **hyperparams: of an optimizer by `optax.inject_hyperparams`, such as the peak rate; nothing compiles again.

        Returns:
          What came out.
        """
        state = self._start(adapted)
        if hyperparams:
            given = {name: jnp.asarray(value, jnp.float32) for name, value in hyperparams.items()}
            state = state._replace(opt_state=state.opt_state._replace(hyperparams=given))
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
        losses, seconds = [], []
        for batch in batches:
            state, loss, spent = self._advance(state, jax.tree.map(jnp.asarray, batch))
            losses.append(loss)
            seconds.append(spent)
            on_step(loss, spent)
        adapted = sj.combine(state.trainable, state.frozen)
        return Trained(adapted, losses, statistics.median(seconds), state_bytes)

    def timed_step(self, adapted: Any, batch: Any) -> Callable[[], float]:
        """Returns a function that takes one more step on the same batch and returns its seconds.

        Args:
          adapted: tree with stand-in weights.
          batch: what every step sees.
        """
        state, batch = self._start(adapted), jax.tree.map(jnp.asarray, batch)
        self._compile(state, batch)

        def step() -> float:
            nonlocal state
            state, _, seconds = self._advance(state, batch)
            return seconds

        return step

    def _start(self, adapted: Any) -> sj.training.TrainState:
        return sj.training.init_train_state(adapted, self._optimizer, jax.random.key(0))

    def _advance(self, state: sj.training.TrainState, batch: Any) -> tuple[sj.training.TrainState, float, float]:
        """Takes a step; returns the state, the loss and the seconds that the step took."""
        compiled = self._compile(state, batch)
        start = time.perf_counter()
        new, metrics = compiled(state._replace(frozen=None), state.frozen, batch)
        loss = float(metrics["loss"])
        return new._replace(frozen=state.frozen), loss, time.perf_counter() - start

    def _compile(self, state: sj.training.TrainState, batch: Any) -> Any:
        """The compiled step, one for all runs of the same shapes: what some methods train depends on the data."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(state))
        if shapes not in self._compiled:
            start = time.perf_counter()
            compiled = self._compiled[shapes] = self._step.lower(state, batch).compile()
            self.compile_seconds = time.perf_counter() - start
            self.flops = float(compiled.cost_analysis().get("flops", 0.0))
            memory = compiled.memory_analysis()
            held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            self.memory_bytes = int(held + memory.temp_size_in_bytes)
        return self._compiled[shapes]


def warmup_linear(learning_rate: float, steps: int, warmup_share: float = 0.06) -> optax.Schedule:
    """Returns the schedule of the LoRA paper: linear warm-up over 6 % of the steps, linear decay to zero."""
    warmup = max(1, round(warmup_share * steps))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, warmup),
            optax.linear_schedule(learning_rate, 0.0, max(1, steps - warmup)),
        ],
        [warmup],
    )


def evaluate(logits: Callable[[Any, Any], jax.Array], params: Any, batches: Iterable[Any]) -> tuple[float, np.ndarray]:
    """Returns accuracy over batches with `labels`, and all logits.

    Args:
      logits: `logits(params, batch)`, compiled by the caller if it is called often.
      params: a tree, with or without stand-in weights.
      batches: dicts of arrays; the last may be shorter and is padded, so that nothing compiles twice.
    """
    outputs, labels, size = [], [], None
    for batch in batches:
        count = len(batch["labels"])
        size = size or count
        padded = {k: np.concatenate([v, np.repeat(v[:1], size - count, axis=0)]) for k, v in batch.items()}
        outputs.append(np.asarray(logits(params, jax.tree.map(jnp.asarray, padded)))[:count])
        labels.append(batch["labels"])
    everything = np.concatenate(outputs)
    return float((everything.argmax(-1) == np.concatenate(labels)).mean()), everything
