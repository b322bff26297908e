"""A step of the learners of GPM and OSF, in the middle of a stream, beside that of full fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from benchmarks._measure import combined, cost, interleaved, paired_ratio

FULL = "full fine-tuning"
GOAL = 1.3
# How a learner's step can be had, by what it is called.
WAYS: dict[str, dict[str, Any]] = {
    "common width": {"width": "common"},
    "bucketed": {"width": "bucketed"},
    "bucketed, update only": {"width": "bucketed", "project_gradients": False},
}


def learners(loss: Callable[[Any, Any], jax.Array], k: int) -> dict[str, sj.continual.Learner]:
    """Returns the learners by what they are called, full fine-tuning first.

    Args:
      loss: of kernels alone.
      k: how many singular triples OSF freezes; what GPM protects is in the memory that it is given.
    """
    adam = optax.adam(1e-3)
    found = {FULL: sj.continual.sequential_learner(loss, {"**": sj.full()}, adam)}
    for name, options in WAYS.items():
        found[f"GPM, {name}"] = sj.methods.gpm.learner(loss, "**", adam, **options)
    for name, options in WAYS.items():
        found[f"OSF, {name}"] = sj.methods.osf.learner(loss, "**", adam, tasks=1, preserved=lambda _: k, **options)
    return found


class _Runner:
    """Runs the compiled steps of one learner, each from where the last one ended."""

    def __init__(self, learner: sj.continual.Learner, params: Any, bases: Any, x: jax.Array) -> None:
        self.key, self.x = jax.random.key(0), x
        state = learner.init(params, self.key)
        if learner.name == "gpm":
            state = state._replace(memory={p: _remembered(m, bases[p]) for p, m in state.memory.items()})
        self.state = learner.start_task(state, 0, self.key)
        self.cost, self.step = cost(learner.step, (self.state, x, self.key), donate_argnums=0)
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        self.seconds: list[float] = []

    def run(self) -> None:
        """Runs and times one step."""
        start = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.step(self.state, self.x, self.key))
        self.seconds.append(time.perf_counter() - start)


def _remembered(memory: Any, basis: jax.Array) -> Any:
    k = basis.shape[-1]
    return memory._replace(basis=memory.basis.at[:, :k].set(basis), rank=jnp.full_like(memory.rank, k))


def measure(model: Callable[[Any, Any], jax.Array], params: Any, bases: Any, rows: int, rounds: int) -> dict[str, Any]:
    """Returns what a step of every learner costs.

    Args:
      model: of parameters and inputs.
      params: kernels by path.
      bases: by path the directions that earlier tasks use, `[d, k]`.
      rows: of the input.
      rounds: timed steps of each learner.
    """
    apply = sj.with_adapters(model)
    k, width = next(iter(bases.values())).shape[-1], next(iter(params.values())).shape[0]
    x = jnp.asarray(np.random.default_rng(2).normal(size=(rows, width)), jnp.float32)
    made = learners(lambda tree, x: jnp.mean(jnp.square(apply(tree, x) - 1.0)), k)
    runners = {name: _Runner(learner, params, bases, x) for name, learner in made.items()}
    interleaved(list(runners.values()), rounds)
    full = runners[FULL]
    return {
        name: {
            "step": combined([one.cost]),
            "seconds": one.seconds,
            "state_bytes": one.bytes,
            "ratios": {
                "flops": one.cost.flops / full.cost.flops,
                "seconds": paired_ratio(one.seconds, full.seconds),
            },
        }
        for name, one in runners.items()
    }


def rows(measured: dict[str, Any], order: list[str]) -> list[list[str]]:
    """Returns the table of all learners, by rows of the input.

    Args:
      measured: by number of rows what `measure` gave.
      order: names of the learners.
    """
    table = [["learner", "rows of a step", "GFLOP", "of full", f"at most {GOAL}", "ms", "of full", "learner's state"]]
    for count, found in measured.items():
        for name in order:
            values = found[name]
            ratio = values["ratios"]["flops"]
            table.append(
                [
                    *(name, str(count), f"{values['step']['flops'] / 1e9:.2f}", f"{ratio:.2f}"),
                    "" if name == FULL else ("yes" if ratio <= GOAL else "no"),
                    f"{1e3 * float(np.median(values['seconds'])):.1f}",
                    f"{values['ratios']['seconds']:.2f}",
                    f"{values['state_bytes'] / 2**20:.1f} MiB",
                ]
            )
    return table
