"""One training step under the projections of continual learning, beside the plain one, in one process."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import subspace_jax as sj
from benchmarks._benchmark import Benchmark, Rows
from benchmarks._charts import Chart
from benchmarks._measure import combined, cost, interleaved, paired_ratio
from experiments.runner import human_bytes

PLAIN = "plain Adam"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      width: of the square kernels.
      layers: number of them, one after the other with tanh between.
      rows: of the input.
      protected: share of the directions that earlier tasks hold.
      r1: rank of CoSO's subspaces.
      r2: rank of its sketches.
      gap: steps from one of its subspaces to the next.
      rounds: timed steps of each way, one after the other in every round.
    """

    width: int = 512
    layers: int = 4
    rows: int = 4096
    protected: float = 0.5
    r1: int = 70
    r2: int = 160
    gap: int = 20
    rounds: int = 10


class Way(NamedTuple):
    """How a step is taken: an adapted tree, its optimizer, and how to make the state one between refreshes."""

    adapted: Any
    optimizer: Callable[[Any], optax.GradientTransformation]
    ordinary: Callable[[Any], Any] = lambda state: state


def model(params: Any, x: jax.Array) -> jax.Array:
    """Returns the output of all layers."""
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return x


def ways(config: Config) -> dict[str, Way]:
    """Returns every way to take a step, the plain one first."""
    keys = jax.random.split(jax.random.key(0), config.layers)
    draw = jax.nn.initializers.orthogonal()
    params = {f"layer_{i}": draw(key, (config.width, config.width)) for i, key in enumerate(keys)}
    k = int(config.protected * config.width)
    bases = {name: kernel[:, :k] for name, kernel in params.items()}  # orthonormal columns, as the kernels have them

    def adapt(method: sj.Method) -> Any:
        return sj.adapt(params, {"**": method}, key=jax.random.key(1))

    def osf(width: Any) -> Way:
        return Way(adapt(sj.osf(k, width=width)), lambda frozen: sj.methods.osf.projection(optax.adam(1e-3), frozen))

    def coso(side: Any) -> Way:
        optimizer = sj.coso(1e-3, config.r1, config.r2, config.gap, side, tasks=4)
        # A count that is not a multiple of the gap, known to the compiler: the branch that decomposes folds away.
        return Way(params, lambda _: optimizer, lambda state: state._replace(count=jnp.ones([], jnp.int32)))

    return {
        PLAIN: Way(params, lambda _: optax.adam(1e-3)),
        "project_orthogonal, then SGD": Way(
            params, lambda _: optax.chain(sj.project_orthogonal(bases), optax.sgd(1e-3))
        ),
        "project_orthogonal, then Adam": Way(
            params, lambda _: optax.chain(sj.project_orthogonal(bases), optax.adam(1e-3))
        ),
        "sandwich around Adam": Way(params, lambda _: sj.sandwich(optax.adam(1e-3), bases)),
        "OSF": osf("exact"),
        "OSF, common width": osf("common"),
        "CoSO, output side": coso("out"),
        "CoSO, input side": coso("in"),
    }


class _Runner:
    """Runs the compiled steps of one way, each from where the last one ended."""

    def __init__(self, way: Way, x: jax.Array) -> None:
        self.trainable, self.frozen = sj.partition(way.adapted) if _has_weights(way.adapted) else (way.adapted, None)
        self.trainable = jax.tree.map(jnp.copy, self.trainable)  # donated
        optimizer = way.optimizer(self.frozen)
        apply = sj.with_adapters(model)

        def step(trainable: Any, state: Any, frozen: Any, x: jax.Array) -> tuple[Any, Any]:
            def loss(trainable: Any) -> jax.Array:
                params = trainable if frozen is None else sj.combine(trainable, frozen)
                return jnp.mean(jnp.square(apply(params, x) - 1.0))

            updates, state = optimizer.update(jax.grad(loss)(trainable), way.ordinary(state), trainable)
            return optax.apply_updates(trainable, updates), state

        self.state, self.x = jax.jit(optimizer.init)(self.trainable), x
        self.cost, self.step = cost(step, (self.trainable, self.state, self.frozen, x), donate_argnums=(0, 1))
        self.seconds: list[float] = []

    def run(self) -> None:
        start = time.perf_counter()
        arguments = (self.trainable, self.state, self.frozen, self.x)
        self.trainable, self.state = jax.block_until_ready(self.step(*arguments))
        self.seconds.append(time.perf_counter() - start)


def _has_weights(tree: Any) -> bool:
    return any(sj.core.is_weight(leaf) for leaf in jax.tree.leaves(tree, is_leaf=sj.core.is_weight))


def run(config: Config, console: Console) -> dict[str, Any]:
    """Measures all ways in turns."""
    x = jax.random.normal(jax.random.key(2), (config.rows, config.width))
    runners = {}
    for name, way in ways(config).items():
        console.print(f"  compiling {name}")
        runners[name] = _Runner(way, x)
    console.print(f"  running {config.rounds} rounds")
    interleaved(list(runners.values()), config.rounds)
    plain, found = runners[PLAIN], {}
    for name, runner in runners.items():
        found[name] = {
            "step": combined([runner.cost]),
            "seconds": runner.seconds,
            "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(runner.state)),
            "ratios": {
                "flops": runner.cost.flops / plain.cost.flops,
                "seconds": paired_ratio(runner.seconds, plain.seconds),
            },
        }
    note = (
        f"CoSO's steps are those between refreshes, {config.gap - 1} of {config.gap}; a refresh decomposes the "
        "gradient beside. The optimizer's state holds the protected directions too. Time ratios are medians over "
        "rounds in which all ways ran one after the other."
    )
    return {"ways": found, "order": list(found), "notes": [note]}


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """One table of all ways."""
    rows = [["step", "GFLOP", "of plain", "ms", "of plain", "optimizer state"]]
    for name in results["order"]:
        values = results["ways"][name]
        rows.append(
            [
                name,
                f"{values['step']['flops'] / 1e9:.2f}",
                f"{values['ratios']['flops']:.3f}",
                f"{1e3 * statistics.median(values['seconds']):.1f}",
                f"{values['ratios']['seconds']:.2f}",
                human_bytes(values["state_bytes"]),
            ]
        )
    return [("one step", rows)]


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """Operations and time of every way."""
    ratios = {name: results["ways"][name]["ratios"] for name in results["order"]}
    bars = {name: {"operations": r["flops"], "step time": r["seconds"]} for name, r in ratios.items()}
    return [Chart("a training step", "relative to plain Adam", bars, reference=1.0)]


BENCHMARK = Benchmark(
    name="projected_step",
    claim="What projecting away from earlier tasks adds to a training step: OSF, CoSO, project_orthogonal, sandwich.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
