"""Ways to the covariance of activations: summed from chunks of them, or decomposed with all rows in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import subspace_jax as sj
from benchmarks._measure import Cost, cost
from benchmarks._starts import times


def _add(total: jax.Array, part: jax.Array) -> jax.Array:
    return total + times(part.T, part)


def _by_qr(x: jax.Array) -> jax.Array:
    r = jnp.linalg.qr(x, mode="r")
    return times(r.T, r)


def _by_svd(x: jax.Array) -> jax.Array:
    _, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return times(vt.T * s**2, vt)


def _damped(gram: jax.Array) -> jax.Array:
    return sj.methods.corda.damped_covariance(gram).covariance


def covariances(inputs: int, rows: int, chunk: int, console: Console) -> list[dict[str, Any]]:
    """Times every way once, and what CorDA does to the covariance before it is used.

    Args:
      inputs: width of the activations.
      rows: number of them.
      chunk: rows that are in memory at a time where they are streamed.
      console: hears of every way.

    Returns:
      For each way its seconds, the bytes that its program holds, and the relative error of the covariance.
    """
    rng = np.random.default_rng(2)
    scales = rng.permutation(np.arange(1, inputs + 1, dtype=np.float32) ** -0.5)
    drawn = rng.standard_normal((rows, inputs), np.float32) * scales
    exact = drawn.astype(np.float64).T @ drawn.astype(np.float64)
    x, zeros = jnp.asarray(drawn), jnp.zeros((inputs, inputs))
    chunks = [x[i : i + chunk] for i in range(0, rows, chunk)]
    added, add = cost(_add, (zeros, chunks[0]))

    def stream() -> Any:
        total = zeros
        for part in chunks:
            total = jax.block_until_ready(add(total, part))
        return total

    def capture() -> Any:
        kernel = jnp.ones((inputs, inputs))
        return sj.capture(lambda params, x: x @ params["kernel"], {"kernel": kernel}, chunks)["kernel"].gram

    found = []

    def measure(name: str, counted: Cost | None, work: Callable[[], Any], target: np.ndarray | None = exact) -> None:
        begun = time.perf_counter()
        made = jax.block_until_ready(work())
        seconds = time.perf_counter() - begun
        held = None if counted is None else counted.temporary_bytes + counted.argument_bytes
        error = None if target is None else float(np.linalg.norm(np.asarray(made) - target) / np.linalg.norm(target))
        found.append({"way": name, "seconds": seconds, "held_bytes": held, "error": error})
        console.print(f"  {name}: {seconds:.2f} s")

    jax.block_until_ready(stream())
    measure("Gram, streamed", added, stream)
    measure("sj.capture, with the layer's own product and compiling", None, capture)
    for name, program in {"QR of all rows": _by_qr, "SVD of all rows": _by_svd}.items():
        counted, compiled = cost(program, (x,))
        measure(name, counted, lambda compiled=compiled: compiled(x))
    gram = jnp.asarray(exact, jnp.float32)
    counted, damp = cost(_damped, (gram,))
    measure("CorDA's damping of it: Cholesky, inverse and its error", counted, lambda: damp(gram), None)
    return found
