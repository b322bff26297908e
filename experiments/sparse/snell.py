"""SNELL's kernel on matrices: what two factors of a width can fit, beside the best matrix of that rank.

A Gaussian matrix, and a sparse one (a tenth of the entries), are fitted by the distance kernel (coefficients 1 and -1)
and by the linear one, which is a product of rank r. Both have the same factors' start, steps, cosine schedule and grid
of rates, of which the best mean error counts; "best of the rank" is the tail of the singular values, the least error
that any product of the rank leaves. Then the numerical rank of both kernels, before any competition.

    python -m experiments run snell

Measured over five seeds, each arm at the best of five rates, mean squared error and its ratio to the best of rank 8:

| target | distance kernel | ratio | linear kernel | ratio |
| --- | --- | --- | --- | --- |
| 64 x 64 | 0.545 ± 0.010 | 0.88 ± 0.01 | 0.622 ± 0.008 | 1.00 |
| 64 x 64, sparse | 0.027 ± 0.003 | 0.50 ± 0.03 | 0.055 ± 0.004 | 1.00 |
| 128 x 128 | 0.740 ± 0.006 | 0.94 ± 0.00 | 0.786 ± 0.006 | 1.00 |
| 128 x 128, sparse | 0.054 ± 0.003 | 0.71 ± 0.03 | 0.076 ± 0.003 | 1.00 |

So the claim shows: with as many values the distance kernel fits what no product of that rank can, and a sparse matrix
of side 64 with half the error. Its numerical rank is that of the array, 96 for factors of width 8, and the linear
kernel's is 8.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from experiments.runner import Context, Experiment, Tuning, best_runs, with_spread

snell = sj.methods.snell


@dataclasses.dataclass(frozen=True)
class SnellConfig:
    """Settings.

    Attributes:
      sizes: sides of the square targets.
      rank: width of the factors.
      density: share of entries of the sparse target that are not zero.
      steps: optimizer steps.
      rates: learning rates tried for every arm.
      seeds: one target and start per seed.
    """

    sizes: tuple[int, ...] = (64, 128)
    rank: int = 8
    density: float = 0.1
    steps: int = 4000
    rates: tuple[float, ...] = (3e-2, 1e-1, 3e-1, 1.0, 3.0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


def target(size: int, density: float, seed: int) -> np.ndarray:
    """Returns a Gaussian matrix, of which a share of the entries is kept."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, size)) * (rng.random((size, size)) < density)


@functools.partial(jax.jit, static_argnames=("kernel", "rank", "steps"))
def fit(kernel: Any, targets: jax.Array, rates: jax.Array, rank: int, steps: int) -> jax.Array:
    """Mean squared errors `[seeds, rates]` after training."""

    def one(target: jax.Array, key: jax.Array, rate: jax.Array) -> jax.Array:
        pieces = 2 if kernel == "distance" else 1
        shape = (pieces, target.shape[0], rank // pieces)
        factors = tuple(jax.random.normal(k, shape) for k in jax.random.split(key))

        def loss(factors: tuple[jax.Array, jax.Array]) -> jax.Array:
            # Ten times the library's coefficients, so that they are 1 and -1.
            scale = 10.0 if kernel == "distance" else 1.0
            return jnp.mean((scale * snell.kernel_matrix(kernel, *factors, {}) - target) ** 2)

        optimizer = optax.adam(optax.cosine_decay_schedule(1.0, steps))

        def step(carry: Any, _: None) -> tuple[Any, None]:
            factors, state = carry
            updates, state = optimizer.update(jax.grad(loss)(factors), state)
            return (jax.tree.map(lambda v, u: v + rate * u, factors, updates), state), None

        (factors, _), _ = jax.lax.scan(step, (factors, optimizer.init(factors)), None, length=steps)
        return loss(factors)

    keys = jax.random.split(jax.random.key(0), len(targets))
    return jax.vmap(jax.vmap(one, (None, None, 0)), (0, 0, None))(targets, keys, rates)


def run(config: SnellConfig, context: Context) -> dict[str, Any]:
    """Fits every target, and counts ranks."""
    runs, tails = [], []
    cases = [(size, density) for size in config.sizes for density in (1.0, config.density)]
    for (size, density), kernel in context.track([(c, k) for c in cases for k in ("distance", "linear")], "matrices"):
        targets = np.stack([target(size, density, seed) for seed in config.seeds])
        found = fit(kernel, jnp.asarray(targets, jnp.float32), jnp.asarray(config.rates), config.rank, config.steps)
        name = f"{size} x {size}{', sparse' if density < 1 else ''}"
        for (i, seed), (j, rate) in ((s, r) for s in enumerate(config.seeds) for r in enumerate(config.rates)):
            one = {"method": f"{kernel}, {name}", "target": name, "learning_rate": rate, "seed": seed}
            runs.append(one | {"error": float(found[i, j])})
        if kernel == "linear":
            for seed, matrix in zip(config.seeds, targets, strict=True):
                values = np.linalg.svd(matrix, compute_uv=False)
                tails.append(
                    {"target": name, "seed": seed, "error": float((values[config.rank :] ** 2).sum() / size**2)}
                )
    ranks = [{"seed": s, "distance": _rank("distance", s), "linear": _rank("linear", s)} for s in config.seeds]
    return {"runs": runs, "tails": tails, "ranks": ranks}


def _rank(kernel: Any, seed: int) -> int:
    """Singular values above 1e-6 of the largest, in float64, of factors of width 8 and 96 rows."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        a, b = (jnp.asarray(rng.normal(size=(2, 96, 4))) for _ in range(2))
        values = np.linalg.svd(np.asarray(snell.kernel_matrix(kernel, a, b, {})), compute_uv=False)
    return int((values > 1e-6 * values[0]).sum())


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns the errors at the best rates, and of the best matrix of the rank."""
    table = [["fit", "learning rate", "mean squared error", "of the best of the rank"]]
    tails: dict[str, list[float]] = {}
    for one in results["tails"]:
        tails.setdefault(one["target"], []).append(one["error"])
    for name, best in best_runs(results["runs"], "error", smallest=True).items():
        errors = [r["error"] for r in best]
        ratio = [e / t for e, t in zip(errors, tails[best[0]["target"]], strict=True)]
        table.append([name, f"{best[0]['learning_rate']:g}", with_spread(errors, 3, 1.0), with_spread(ratio, 2, 1.0)])
    for name, errors in tails.items():
        table.append([f"best of the rank, {name}", "", with_spread(errors, 3, 1.0), "1"])
    for kernel in ("distance", "linear"):
        found = [r[kernel] for r in results["ranks"]]
        table.append([f"rank of {kernel}, width 8, 96 x 96", "", f"{min(found)} to {max(found)}", ""])
    return table


EXPERIMENT = Experiment(
    name="snell",
    claim="A distance kernel of two narrow factors fits full-rank and sparse matrices better than any product of them.",
    config=SnellConfig,
    run=run,
    rows=rows,
    tuning=Tuning(key="error", smallest=True),
)
