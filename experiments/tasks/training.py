"""The training loop that experiments share: differentiate what learns, donate the state, log every step."""

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
    """Trains what `partition` calls trainable; compiles once for all runs of the same shapes.

    Args:
      loss: `loss(adapted, batch)`, a scalar.
      optimizer: any optax transformation.

    Attributes:
      compile_seconds: what compiling the step took.
      flops: operations of a step, as the compiler counts them.
    """

    def __init__(self, loss: Callable[[Any, Any], jax.Array], optimizer: optax.GradientTransformation) -> None:
        self._optimizer = optimizer
        self._compiled: Any = None
        self.compile_seconds = 0.0
        self.flops = 0.0

        def step(trainable: Any, state: Any, frozen: Any, batch: Any):
            def objective(trainable: Any) -> jax.Array:
                return loss(sj.combine(trainable, frozen), batch)

            value, gradients = jax.value_and_grad(objective)(trainable)
            updates, state = optimizer.update(gradients, state, trainable)
            return optax.apply_updates(trainable, updates), state, value

        self._step = jax.jit(step, donate_argnums=(0, 1))

    def run(
        self, adapted: Any, batches: Iterable[Any], on_step: Callable[[float, float], None] = lambda loss, seconds: None
    ) -> Trained:
        """Runs one step per batch.

        Args:
          adapted: tree with stand-in weights.
          batches: batches of one shape.
          on_step: told loss and seconds after every step.

        Returns:
          What came out.
        """
        trainable, frozen = sj.partition(adapted)
        trainable = jax.tree.map(jnp.copy, trainable)  # the donated step must not free the caller's arrays
        state = self._optimizer.init(trainable)
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        losses, seconds = [], []
        for batch in batches:
            batch = jax.tree.map(jnp.asarray, batch)
            self._compile(trainable, state, frozen, batch)
            start = time.perf_counter()
            trainable, state, value = self._compiled(trainable, state, frozen, batch)
            losses.append(float(value))
            seconds.append(time.perf_counter() - start)
            on_step(losses[-1], seconds[-1])
        return Trained(sj.combine(trainable, frozen), losses, statistics.median(seconds), state_bytes)

    def timed_step(self, adapted: Any, batch: Any) -> Callable[[], float]:
        """Returns a function that takes one more step on the same batch and returns its seconds.

        Args:
          adapted: tree with stand-in weights.
          batch: what every step sees.
        """
        trainable, frozen = sj.partition(adapted)
        carry = jax.tree.map(jnp.copy, trainable)
        carry, batch = (carry, self._optimizer.init(carry)), jax.tree.map(jnp.asarray, batch)
        self._compile(*carry, frozen, batch)

        def step() -> float:
            nonlocal carry
            start = time.perf_counter()
            trainable, state, value = self._compiled(*carry, frozen, batch)
            jax.block_until_ready(value)
            carry = trainable, state
            return time.perf_counter() - start

        return step

    def _compile(self, *arguments: Any) -> None:
        """Compiles the step once, for all runs of the same shapes."""
        if self._compiled is None:
            start = time.perf_counter()
            self._compiled = self._step.lower(*arguments).compile()
            self.compile_seconds = time.perf_counter() - start
            self.flops = float(self._compiled.cost_analysis().get("flops", 0.0))


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
