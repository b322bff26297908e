"""Every merger beside what it cannot do without: reading all experts once, and its decompositions by LAPACK."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from rich.console import Console

import subspace_jax as sj
from benchmarks._benchmark import Benchmark, Rows
from benchmarks._charts import Chart
from benchmarks._measure import fastest
from experiments.tasks.merger_arms import arms

# Inputs and outputs of a block's kernels, as multiples of the width, and how many of them there are.
KERNELS = {"attention": (1, 1, 4), "up": (1, 4, 1), "down": (4, 1, 1)}
SINGULAR, SOLVE = "singular values", "solve"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; the defaults have the kernels of one of MiniLM's six blocks.

    Attributes:
      kinds: of experts, "full" (any change) and "lora".
      width: of the model.
      layers: blocks.
      experts: that are merged.
      rank: of LoRA experts.
      rounds: of which the fastest counts, after one that compiles.
    """

    kinds: tuple[str, ...] = ("full", "lora")
    width: int = 384
    layers: int = 1
    experts: int = 8
    rank: int = 8
    rounds: int = 1


def decompositions(name: str, sides: tuple[int, int], experts: int) -> list[tuple[str, tuple[int, int], int]]:
    """Returns what a merger decomposes of one kernel whose changes have full rank: kind, shape and how often.

    Args:
      name: of the merger.
      sides: inputs and outputs of the kernel.
      experts: number of them.
    """
    inputs, outputs = sides
    kept = min(sides) // experts * experts  # TSV-M keeps as many directions of all experts as fit
    found = {
        # A decomposition for each expert, then the nearest orthogonal factors of both stacks of what is kept.
        "TSV-M": [(SINGULAR, sides, experts), (SINGULAR, (inputs, kept), 1), (SINGULAR, (kept, outputs), 1)],
        "Iso-C": [(SINGULAR, sides, 1)],
        "KnOTS + TIES": [(SINGULAR, (inputs, experts * outputs), 1)],
        "RegMean": [(SOLVE, sides, 1)],
        # The rotation nearest to each expert, on the smaller side.
        "OrthoMerge + task arithmetic": [(SINGULAR, (min(sides), min(sides)), experts)],
        "OrthoMerge + TIES": [(SINGULAR, (min(sides), min(sides)), experts)],
    }
    return found.get(name, [])


def run(config: Config, console: Console) -> dict[str, Any]:
    """Times every merger of every kind of experts."""
    base, fishers, grams = _model(config)
    measured: dict[str, Any] = {}
    for kind in config.kinds:
        experts = [_expert(config, kind, base, seed) for seed in range(config.experts)]
        read = fastest(lambda experts=experts: _sums(experts), config.rounds)
        for name, (_, merger) in arms(kind, fishers, grams, side="auto").items():
            seconds = fastest(lambda merger=merger, experts=experts: merger(experts, base), config.rounds)
            least = read + (_least(config, name, base) if kind == "full" else 0.0)
            measured[f"{kind}: {name}"] = {"seconds": seconds, "read_seconds": read, "least_seconds": least}
            console.print(f"  {kind}, {name}: {seconds:.2f} s, {seconds / least:.1f} of the least")
    values = sum(leaf.size for leaf in jax.tree.leaves(base))
    notes = [
        f"{config.experts} experts of {values:,} values. The least is one sum over all arrays of the experts, and, for "
        "changes of full rank, the decompositions of the method by LAPACK one after the other (`scipy.linalg`). Of "
        "LoRA experts the factors alone are read, so what forms a change has more to do than the least says. "
        "DO-Merging takes gradient steps, whose number is its own."
    ]
    return {"measured": measured, "order": list(measured), "notes": notes}


def _model(config: Config) -> tuple[Any, Any, Any]:
    """A base, and for every expert squared gradients and Gram matrices by path, of random numbers."""
    rng = np.random.default_rng(0)
    base: dict[str, Any] = {}
    for layer in range(config.layers):
        for name, (inputs, outputs, count) in KERNELS.items():
            for i in range(count):
                shape = (inputs * config.width, outputs * config.width)
                base[f"layer_{layer}_{name}_{i}"] = jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)
    squared = [{path: jnp.square(leaf) for path, leaf in base.items()}] * config.experts
    x = {path: rng.normal(size=(2 * leaf.shape[0], leaf.shape[0])) for path, leaf in base.items()}
    gram = {path: jnp.asarray(one.T @ one, jnp.float32) for path, one in x.items()}
    return base, squared, [gram] * config.experts


def _expert(config: Config, kind: str, base: Any, seed: int) -> Any:
    """The base with a change of small random numbers."""
    rng = np.random.default_rng(1 + seed)
    if kind == "full":
        return {k: v + 0.01 * jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in base.items()}
    trainable, frozen = sj.partition(sj.adapt(base, {"*": sj.lora(config.rank)}, key=jax.random.key(seed)))
    changed = jax.tree.map(lambda v: jnp.asarray(0.1 * rng.normal(size=v.shape), v.dtype), trainable)
    return sj.combine(changed, frozen)


def _sums(experts: Sequence[Any]) -> Any:
    """Reads what the experts do not share once."""
    trainable = [sj.partition(one)[0] for one in experts]
    own = trainable if jax.tree.leaves(trainable) else experts
    return _sum(own)


@jax.jit
def _sum(trees: Any) -> Any:
    return jax.tree.map(jnp.sum, trees)


def _least(config: Config, name: str, base: Mapping[str, jax.Array]) -> float:
    """Seconds of the decompositions of all kernels; equal ones are timed once."""
    seconds, known = 0.0, {}
    for leaf in base.values():
        inputs, outputs = leaf.shape
        for kind, shape, times in decompositions(name, (inputs, outputs), config.experts):
            if (kind, shape) not in known:
                known[kind, shape] = _lapack(kind, shape)
            seconds += times * known[kind, shape]
    return seconds


def _lapack(kind: str, shape: tuple[int, int]) -> float:
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    if kind == SINGULAR:
        return fastest(lambda: scipy.linalg.svd(matrix, full_matrices=False), 1)
    gram = matrix @ matrix.T + np.eye(shape[0], dtype=np.float32)
    return fastest(lambda: scipy.linalg.solve(gram, matrix, assume_a="pos"), 1)


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """Returns seconds, and how many times the least they are."""
    rows = [["experts: merger", "seconds", "one reading of the experts", "least", "of the least"]]
    for name in results["order"]:
        one = results["measured"][name]
        ratio = one["seconds"] / one["least_seconds"]
        times = (one["seconds"], one["read_seconds"], one["least_seconds"])
        rows.append([name, *(f"{value:.3f}" for value in times), f"{ratio:.1f}"])
    return [("Mergers beside their arithmetic", rows)]


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """Seconds beside the least."""
    bars = {
        name: {"took": one["seconds"], "least": one["least_seconds"]}
        for name, one in ((name, results["measured"][name]) for name in results["order"])
    }
    return [Chart("merging", "seconds", bars, log=True)]


BENCHMARK = Benchmark(
    name="mergers",
    claim="Every merger's time beside one reading of the experts and its decompositions by LAPACK.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
