"""One update of low-rank optimizers, Adam and Muon on the matrices of a transformer, in one process."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib
from rich.console import Console

import subspace_jax as sj
from benchmarks._benchmark import Benchmark, Rows, number
from benchmarks._charts import Chart
from benchmarks._measure import Cost, combined, cost, interleaved, paired_ratio
from experiments.runner import human_bytes

BASELINE = "optax.adam"
# Of transformations of convolutions, which have kernels of their own.
CONVOLUTIONS = "optax.adam, convolutions"
RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      width: of the model; every layer has four square matrices of it.
      mlp_width: every layer has two matrices from and to it.
      layers: number of layers, each with matrices of its own.
      channels: of the 3 x 3 convolutions on which orthogonality is measured, one a layer.
      rank: of the low-rank optimizers.
      every: steps from one decomposition to the next, of those that have one.
      rounds: timed updates of each optimizer, one after the other in every round.
      only: names of the optimizers to run; all if empty.
    """

    width: int = 512
    mlp_width: int = 2048
    layers: int = 2
    channels: int = 64
    rank: int = 64
    every: int = 200
    rounds: int = 10
    only: tuple[str, ...] = ()


def parameters(config: Config) -> dict[str, Any]:
    """Returns zeros of the shapes of the model's kernels."""
    wide, tall = (config.width, config.mlp_width), (config.mlp_width, config.width)
    layer = {name: jnp.zeros((config.width, config.width)) for name in ("q", "k", "v", "out")}
    layer |= {"up": jnp.zeros(wide), "down": jnp.zeros(tall)}
    return {f"layer_{i}": dict(layer) for i in range(config.layers)}


def convolutions(config: Config) -> dict[str, Any]:
    """Returns zeros of the shapes of 3 x 3 kernels."""
    return {f"layer_{i}": jnp.zeros((3, 3, config.channels, config.channels)) for i in range(config.layers)}


def optimizers(config: Config) -> dict[str, Callable[[int], optax.GradientTransformation]]:
    """Returns makers of the optimizers; they take the steps between decompositions."""
    rank = config.rank

    def rated(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(transformation, optax.scale_by_learning_rate(RATE))

    def subspace(every: int, **options: Any) -> optax.GradientTransformation:
        return rated(sj.optim.in_subspace(optax.scale_by_adam(), rank=rank, every=every, **options))

    return {
        BASELINE: lambda every: optax.adam(RATE),
        "optax.contrib.galore": lambda every: contrib.galore(RATE, rank, update_proj_gap=every),
        "optax.contrib.muon": lambda every: contrib.muon(RATE),
        "sj.galore": lambda every: sj.galore(RATE, rank, every=every, scale=1.0),
        "sj.optim.in_subspace, randomized": lambda every: subspace(every, decomposition="randomized"),
        "sj.methods.dct_lowrank.scale_by_dct_adam": lambda every: rated(sj.methods.dct_lowrank.scale_by_dct_adam(rank)),
        "sj.methods.dct_lowrank.scale_by_dct_adam, fft": lambda every: rated(
            sj.methods.dct_lowrank.scale_by_dct_adam(rank, transform="fft")
        ),
        "sj.methods.dct_lowrank.scale_by_dct_adam, no error feedback": lambda every: rated(
            sj.methods.dct_lowrank.scale_by_dct_adam(rank, error_feedback=False)
        ),
        "sj.methods.dct_lowrank.scale_by_trion": lambda every: rated(sj.methods.dct_lowrank.scale_by_trion(rank)),
        "sj.methods.root.scale_by_root": lambda every: rated(sj.methods.root.scale_by_root()),
        "sj.methods.aro.scale_by_aro": lambda every: rated(sj.methods.aro.scale_by_aro()),
        "sj.methods.frank_wolfe_dictionary.scale_by_spectral_frank_wolfe": lambda every: rated(
            sj.methods.frank_wolfe_dictionary.scale_by_spectral_frank_wolfe(polar_method="newton_schulz")
        ),
        CONVOLUTIONS: lambda every: optax.adam(RATE),
        "sj.methods.orthogonal_conv.add_orthogonality, Adam": lambda every: optax.chain(
            sj.methods.orthogonal_conv.add_orthogonality(0.1, {"**": 1}), optax.adam(RATE)
        ),
    }


def _is_convolutional(name: str) -> bool:
    return name == CONVOLUTIONS or "orthogonal_conv" in name


class _Runner:
    """Runs the compiled updates of one optimizer, each from where the last one ended."""

    def __init__(self, optimizer: optax.GradientTransformation, params: Any, gradient: Any) -> None:
        def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self.params, self.gradient = jax.tree.map(jnp.copy, params), gradient
        self.state = jax.jit(optimizer.init)(self.params)
        self.cost: Cost
        self.cost, self.step = cost(step, (self.params, self.state, gradient), donate_argnums=(0, 1))
        self.seconds: list[float] = []

    def run(self) -> None:
        start = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self.step(self.params, self.state, self.gradient))
        self.seconds.append(time.perf_counter() - start)


def run(config: Config, console: Console) -> dict[str, Any]:
    """Measures ordinary updates of all optimizers in turns, then updates that decompose."""
    starts = {False: parameters(config), True: convolutions(config)}
    gradients = optax.tree.random_like(jax.random.key(0), starts)
    known = {name: make for name, make in optimizers(config).items() if not config.only or name in config.only}
    runners, refreshing = {}, {}
    for name, make in known.items():
        console.print(f"  compiling {name}")
        # Far apart, so that only the first update decomposes, which interleaved() drops.
        kind = _is_convolutional(name)
        runners[name] = _Runner(make(10**6), starts[kind], gradients[kind])
        refreshing[name] = _Runner(make(1), starts[kind], gradients[kind])
    console.print(f"  running {config.rounds} rounds of {len(known)} optimizers, twice")
    interleaved(list(runners.values()), config.rounds)
    interleaved(list(refreshing.values()), config.rounds)
    baselines = {name: runners.get(CONVOLUTIONS if _is_convolutional(name) else BASELINE) for name in known}
    values = {name: _values(config, runners[name], refreshing[name], baselines[name]) for name in known}
    note = (
        "An update decomposes nothing; a refresh does, for optimizers that ever do. Average is "
        f"the time of {config.every} updates of which one refreshes. DCT chooses its columns at every update. The "
        "gradient is given; its computation is not part of this. Ratios are to optax.adam, of the same round; for "
        f"orthogonal convolutions, to Adam on the same {config.channels} channels."
    )
    return {"optimizers": values, "order": list(known), "notes": [note]}


def _values(config: Config, runner: _Runner, refreshing: _Runner, baseline: _Runner | None) -> dict[str, Any]:
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(runner.state))
    ordinary, refresh = (statistics.median(r.seconds) for r in (runner, refreshing))
    average = ((config.every - 1) * ordinary + refresh) / config.every
    found = {
        "state_bytes": state_bytes,
        "update": combined([runner.cost]),
        "refresh": combined([refreshing.cost]),
        "seconds": runner.seconds,
        "refresh_seconds": refreshing.seconds,
        "average_seconds": average,
        "ratios": {},
    }
    if baseline is not None:
        reference = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(baseline.state))
        found["ratios"] = {
            "state_bytes": state_bytes / reference,
            "seconds": paired_ratio(runner.seconds, baseline.seconds),
            "average_seconds": average / statistics.median(baseline.seconds),
        }
    return found


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """One table of all optimizers."""
    head = ["optimizer", "state", "of Adam's", "update GFLOP", "update ms", "of Adam's", "refresh ms"]
    head.append("average of Adam's")
    rows = [head]
    for name in results["order"]:
        values = results["optimizers"][name]
        ratios = values["ratios"]
        rows.append(
            [
                name,
                human_bytes(values["state_bytes"]),
                number(ratios.get("state_bytes")),
                f"{values['update']['flops'] / 1e9:.2f}",
                f"{1e3 * statistics.median(values['seconds']):.1f}",
                number(ratios.get("seconds")),
                f"{1e3 * statistics.median(values['refresh_seconds']):.1f}",
                number(ratios.get("average_seconds")),
            ]
        )
    return [("one update", rows)]


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """Time and state of every optimizer."""
    ratios = {name: results["optimizers"][name]["ratios"] for name in results["order"]}
    times = {n: {"average": r["average_seconds"], "no refresh": r["seconds"]} for n, r in ratios.items() if r}
    state = {n: {"state": r["state_bytes"]} for n, r in ratios.items() if r}
    return [
        Chart("time of an update", "relative to optax.adam", times, reference=1.0, log=True),
        Chart("bytes of the state", "relative to optax.adam", state, reference=1.0),
    ]


BENCHMARK = Benchmark(
    name="optimizers",
    claim="What an update and the state of low-rank optimizers cost beside optax's GaLore, Muon and Adam.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
