"""QLoRA on turned digits: LoRA on kernels in 4 bits, against LoRA on the float32 ones.

The network of `digits_task` is adapted to digits turned by 90 degrees, with everything but the two hidden kernels
frozen; data, steps and rates are the same for every arm, and the best rate of each counts. `uniform 4 bits` stores the
kernels as sixteen equally spaced levels in blocks of 64, at 4.5 bits a value, in place of NF4's.

    python -m experiments run qlora

Measured over three seeds, mean ± standard deviation, at the best of four rates (0.03 for every arm); early loss is that
of steps 20 to 30, the error that of a 256x256 Gaussian matrix:

| kernels | bits a value | early loss | test accuracy % | error % |
| --- | --- | --- | --- | --- |
| float32 (LoRA) | 32 | 1.10 ± 0.34 | 95.5 ± 0.3 | 0 |
| NF4, quantized scales (QLoRA) | 4.13 | 1.06 ± 0.37 | 95.1 ± 1.6 | 9.2 |
| NF4, float32 scales | 4.5 | 1.10 ± 0.26 | 95.2 ± 0.2 | 9.2 |
| uniform 4 bits | 4.5 | 1.06 ± 0.33 | 95.4 ± 1.0 | 10.8 |

So LoRA on kernels in four bits learns as much as on the float32 ones, and quantizing the scales costs nothing. NF4 is
closer to Gaussian weights than equally spaced levels, but that it trains better did not show: the arms are within one
spread.

Source: Dettmers, Pagnoni, Holtzman, Zettlemoyer, QLoRA: Efficient Finetuning of Quantized LLMs, 2023.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from experiments.runner import Context, Experiment, Tuning, best_rates, with_spread
from experiments.tasks import digits_task
from subspace_jax.weights import quantize_nf4


@dataclasses.dataclass(frozen=True)
class QloraConfig:
    """Settings.

    Attributes:
      rank: of every adapter.
      steps: optimizer steps.
      rates: learning rates tried for every arm.
      seeds: one network and one run of every arm per seed.
    """

    rank: int = 4
    steps: int = 150
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    seeds: tuple[int, ...] = (0, 1, 2)


def uniform(array: jax.Array) -> jax.Array:
    """Rounds to -7 ... 7 times a scale, in blocks of 64 consecutive inputs of an output."""
    blocks = array.T.reshape(-1, 64)
    scale = jnp.max(jnp.abs(blocks), axis=1, keepdims=True) / 7
    return (jnp.round(blocks / scale) * scale).reshape(array.T.shape).T


def uniform_lora(rank: int) -> sj.Method:
    """LoRA on an array that was rounded so; a control, not a method of the library."""

    def make(key: jax.Array, array: jax.Array, role: sj.Role, stats: Any) -> Any:
        return sj.lora(rank).init(key, uniform(array), role, stats)

    return sj.Method("uniform 4 bits", make)


def run(config: QloraConfig, context: Context) -> dict[str, Any]:
    """Runs every arm at every rate, and measures what quantization alone does to the kernels."""
    arms = {
        "LoRA": sj.lora(config.rank),
        "QLoRA": sj.qlora(config.rank),
        "QLoRA, plain scales": sj.qlora(config.rank, double_quantization=False),
        "uniform 4 bits": uniform_lora(config.rank),
    }
    optimizers = {rate: optax.adam(rate) for rate in config.rates}
    runs = []
    for name, rate in context.track([(n, r) for n in arms for r in config.rates], "turned digits"):
        for seed in config.seeds:
            rules = {digits_task.HIDDEN: arms[name]}
            runs.append(digits_task.run_record(name, rules, rate, optimizers[rate], seed, config.steps))
    stored = {
        "LoRA": lambda w: w,
        "QLoRA": lambda w: quantize_nf4(w, double=True).materialize(),
        "QLoRA, plain scales": lambda w: quantize_nf4(w).materialize(),
        "uniform 4 bits": uniform,
    }
    errors = []
    for seed in config.seeds:
        w = jnp.asarray(np.random.default_rng(seed).normal(size=(256, 256)), jnp.float32)
        for name, store in stored.items():
            error = float(jnp.linalg.norm(store(w) - w) / jnp.linalg.norm(w))
            errors.append({"arm": name, "seed": seed, "error": error})
    return {"runs": runs, "errors": errors}


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns the best rate of each arm, with the relative error of a Gaussian matrix."""
    header, *body = best_rates(results["runs"])
    found = {line[0]: [e["error"] for e in results["errors"] if e["arm"] == line[0]] for line in body}
    return [[*header, "error of a Gaussian matrix %"], *([*line, with_spread(found[line[0]], 2)] for line in body)]


EXPERIMENT = Experiment(
    name="qlora",
    claim="LoRA on weights in 4 bits learns as much as on the float32 ones.",
    config=QloraConfig,
    run=run,
    rows=rows,
    tuning=Tuning(),
)
