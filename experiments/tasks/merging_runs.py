"""What a comparison of mergers does with each: choose its strength, run it, and time it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import subspace_jax as sj
from experiments.tasks.eight_texts import EightTexts
from experiments.tasks.merger_arms import Arm, origin
from experiments.tasks.peak_memory import measured
from subspace_jax import merging
from subspace_jax.methods.merging.concrete import ada_merging, concrete_task_arithmetic


def bracketed(score: Callable[[float], float], factor: float, most: int = 7) -> dict[float, float]:
    """Tries multiples of a usual strength, powers of a factor, until the best lies inside.

    Args:
      score: tells how good a multiple is; higher is better.
      factor: from one multiple to the next.
      most: multiples that are tried.

    Returns:
      Score by multiple.
    """
    found = {power: score(factor**power) for power in (0, 1, -1)}
    while len(found) < most:
        best = max(found, key=lambda power: found[power])
        if best not in (max(found), min(found)):
            break
        beyond = best + (1 if best == max(found) else -1)
        found[beyond] = score(factor**beyond)
    return {factor**power: value for power, value in found.items()}


@functools.cache
def learners(texts: EightTexts, steps: int, batch_size: int) -> dict[str, Any]:
    """Returns the mergers that learn from inputs without labels, compiled once for all kinds, seeds and rates.

    Args:
      texts: the tasks; inputs are those of their training splits.
      steps: of Adam.
      batch_size: inputs of every task in a step.

    Returns:
      By name, functions of the base, the task vectors, the coefficient of all of them (where it starts, if it is
      learned), the learning rate and a key; to merged parameters.
    """

    def inputs(key: jax.Array) -> list[Any]:
        tokens, mask = (texts.data["train"][name] for name in ("tokens", "mask"))
        rows = jax.random.randint(key, (len(tokens), batch_size), 0, tokens.shape[1])
        tasks = jnp.arange(len(tokens))[:, None]
        return [(tokens[tasks, rows], mask[tasks, rows])]

    def apply(encoder: Any, batch: Any, _: int) -> jax.Array:
        """All tasks at once: the mean of their entropies is a share of the sum, which Adam does not mind."""
        flat = [v.reshape(-1, v.shape[-1]) for v in batch]
        found = texts.features(encoder, *flat).reshape(*batch[0].shape[:2], -1)
        return jnp.einsum("tnd,tdc->tnc", found, texts.heads["kernel"]) + texts.heads["bias"][:, None]

    def ada(base: Any, vectors: Any, start: jax.Array, rate: jax.Array, key: jax.Array) -> Any:
        options: Any = {"start": start, "learning_rate": rate, "steps": steps}
        return ada_merging(apply, base, vectors, inputs, key, **options).params

    def concrete(base: Any, vectors: Any, start: jax.Array, rate: jax.Array, key: jax.Array) -> Any:
        options: Any = {"coefficient": start, "learning_rate": rate, "steps": steps}
        return concrete_task_arithmetic(apply, base, vectors, inputs, key, **options).params

    return {"AdaMerging, by leaf": jax.jit(ada), "Concrete task arithmetic": jax.jit(concrete)}


def learned(
    learn: Any, base: Any, vectors: Any, start: float, seed: int, usual: float, multiple: float
) -> tuple[Any, float, int | None]:
    """Returns what a learning merger makes at a multiple of a usual rate, its seconds and the memory it added."""
    rate = jnp.float32(usual * multiple)
    return measured(lambda: learn(base, vectors, jnp.float32(start), rate, jax.random.key(seed)))


def of_strength(arm: Arm, experts: Sequence[Any], base: Any) -> Callable[[float], tuple[Any, float, int | None]]:
    """Returns what an arm makes at a multiple of its usual strength; it merges once, and scales what it changed.

    Args:
      arm: the usual strength and the merger.
      experts: to merge.
      base: of them.

    Returns:
      A function to plain parameters, the seconds of the merging and the memory that it added.
    """
    usual, merger = arm
    merged, seconds, added = measured(lambda: merger(experts, base))
    plain = sj.merge(merged)
    if usual is None:
        return lambda multiple: (plain, seconds, added)
    start = origin(merger, experts, base)
    return lambda multiple: (merging.task_arithmetic([plain], start, weights=multiple), seconds, added)


def slerp_in_pairs(experts: Sequence[Any], base: Any) -> Any:
    """Merges a power of two of experts: pairs halfway along the arc between their changes, then pairs of those."""
    while len(experts) > 1:
        pairs = zip(experts[::2], experts[1::2], strict=True)
        experts = [merging.slerp(pair, base, t=0.5, of="changes") for pair in pairs]
    return experts[0]
