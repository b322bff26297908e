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
from benchmarks import _learner_steps
from benchmarks._benchmark import Benchmark, Rows, number
from benchmarks._charts import Chart
from benchmarks._measure import combined, cost, interleaved, paired_ratio
from experiments.runner import human_bytes

PLAIN = "plain Adam"
REFRESH = "CoSO, output side, a refresh"


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
      learner_rows: rows of the input in the steps of learners; a batch of 8 short texts has 128.
      learner_protected: share of the directions that earlier tasks hold there.
    """

    width: int = 512
    layers: int = 4
    rows: int = 4096
    protected: float = 0.5
    r1: int = 70
    r2: int = 160
    gap: int = 20
    rounds: int = 10
    learner_rows: tuple[int, ...] = (1024, 128)
    learner_protected: float = 0.3


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


def kernels(config: Config, protected: float) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns kernels, and as many orthonormal columns of each as are protected."""
    keys = jax.random.split(jax.random.key(0), config.layers)
    draw = jax.nn.initializers.orthogonal()
    params = {f"layer_{i}": draw(key, (config.width, config.width)) for i, key in enumerate(keys)}
    return params, {name: kernel[:, : int(protected * config.width)] for name, kernel in params.items()}


def ways(config: Config) -> dict[str, Way]:
    """Returns every way to take a step, the plain one first."""
    params, bases = kernels(config, config.protected)
    k = int(config.protected * config.width)
    removers = {name: sj.linalg.make_remover(basis) for name, basis in bases.items()}

    def adapt(method: sj.Method) -> Any:
        return sj.adapt(params, {"**": method}, key=jax.random.key(1))

    def osf(width: Any, held: Callable[[Any], Any] = lambda frozen: frozen, **options: Any) -> Way:
        project = sj.methods.osf.projection
        return Way(adapt(sj.osf(k, width=width)), lambda frozen: project(optax.adam(1e-3), held(frozen), **options))

    def removing(**options: Any) -> Way:
        return Way(params, lambda _: sj.optim.remove_subspaces(optax.adam(1e-3), removers, **options))

    def coso(side: Any, refresh: bool = False) -> Way:
        optimizer = sj.coso(1e-3, config.r1, config.r2, config.gap, side, tasks=4)
        # A count that is known to the compiler to be a multiple of the gap, or none: the other branch folds away.
        count = config.gap if refresh else 1
        return Way(params, lambda _: optimizer, lambda state: state._replace(count=jnp.asarray(count, jnp.int32)))

    return {
        PLAIN: Way(params, lambda _: optax.adam(1e-3)),
        "project_orthogonal, then SGD": Way(
            params, lambda _: optax.chain(sj.project_orthogonal(bases), optax.sgd(1e-3))
        ),
        "project_orthogonal, then Adam": Way(
            params, lambda _: optax.chain(sj.project_orthogonal(bases), optax.adam(1e-3))
        ),
        "sandwich around Adam": Way(params, lambda _: sj.sandwich(optax.adam(1e-3), bases)),
        "remove_subspaces around Adam": removing(),
        "remove_subspaces after Adam": removing(project_gradients=False),
        "OSF": osf("exact"),
        "OSF, updates alone": osf("exact", project_gradients=False),
        "OSF, common width": osf("common"),
        "OSF, common width, projectors": osf("common", sj.methods.osf.removers),
        "CoSO, output side": coso("out"),
        "CoSO, input side": coso("in"),
        REFRESH: coso("out", refresh=True),
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
    found[f"CoSO, output side, mean of {config.gap}"] = _mean_of_coso(found, config.gap)
    params, bases = kernels(config, config.learner_protected)
    measured = {}
    for count in config.learner_rows:
        console.print(f"  learners, {count} rows")
        measured[str(count)] = _learner_steps.measure(model, params, bases, count, config.rounds)
    note = (
        f"CoSO's steps are those between refreshes, {config.gap - 1} of {config.gap}; a refresh decomposes the "
        "gradient beside, of which the compiler counts no operations. The optimizer's state holds the protected "
        "directions too. Time ratios are medians over rounds in which all ways ran one after the other."
    )
    learners = (
        f"Learners: a step in a task before which {config.learner_protected:.0%} of each kernel's directions are "
        "protected, beside a step of full fine-tuning. What a projection multiplies, and what OSF forms its weight by, "
        "does not grow with the rows, so that its share falls with them."
    )
    order = list(next(iter(measured.values()))) if measured else []
    return {
        **{"ways": found, "order": list(found), "learners": measured, "learner_order": order},
        "notes": [note, learners],
    }


def _mean_of_coso(found: Mapping[str, Any], gap: int) -> dict[str, Any]:
    """The step of CoSO on average, with a refresh every so many; its operations are not counted."""
    usual, refresh, plain = (found[name] for name in ("CoSO, output side", REFRESH, PLAIN))
    pairs = zip(usual["seconds"], refresh["seconds"], strict=True)
    seconds = [((gap - 1) * one + other) / gap for one, other in pairs]
    ratios = {"flops": None, "seconds": paired_ratio(seconds, plain["seconds"])}
    return {"step": {"flops": None}, "seconds": seconds, "state_bytes": usual["state_bytes"], "ratios": ratios}


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """One table of all ways."""
    rows = [["step", "GFLOP", "of plain", "ms", "of plain", "optimizer state"]]
    for name in results["order"]:
        values = results["ways"][name]
        counted = None if name == REFRESH else values["ratios"]["flops"]
        rows.append(
            [
                name,
                number(None if counted is None else values["step"]["flops"] / 1e9),
                number(counted, 3),
                f"{1e3 * statistics.median(values['seconds']):.1f}",
                f"{values['ratios']['seconds']:.2f}",
                human_bytes(values["state_bytes"]),
            ]
        )
    return [
        ("one step", rows),
        ("a step of a learner", _learner_steps.rows(results["learners"], results["learner_order"])),
    ]


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """Operations and time of every way."""
    ratios = {name: results["ways"][name]["ratios"] for name in results["order"]}
    bars = {
        name: {"step time": r["seconds"]} | ({"operations": r["flops"]} if r["flops"] and name != REFRESH else {})
        for name, r in ratios.items()
    }
    steps = {
        f"{name}, {count} rows": {"operations": v["ratios"]["flops"], "step time": v["ratios"]["seconds"]}
        for count, found in results["learners"].items()
        for name, v in ((n, found[n]) for n in results["learner_order"])
    }
    return [
        Chart("a training step", "relative to plain Adam", bars, reference=1.0),
        Chart("a learner's step", "relative to full fine-tuning", steps, reference=1.0),
    ]


BENCHMARK = Benchmark(
    name="projected_step",
    claim="What projecting away from earlier tasks adds to a training step: OSF, GPM, CoSO, project_orthogonal.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
