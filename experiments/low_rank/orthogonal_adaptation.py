"""Orthogonal Adaptation on planted concepts: adapters trained apart, then added up.

A linear layer has inputs that all concepts share (a context) and a token of each concept, which learns with its
adapter. Each concept is to move the output by a vector of its own whenever its token is there. Eight concepts are
trained apart from one common token, their adapters are summed with weight 1, and each is tried with its own token. The
second part has no token: four orders of the pixels of the digits are learned apart by adapters of two hidden kernels,
and summed with the best of four weights, chosen by the errors themselves, alike for all.

    python -m experiments run orthogonal_adaptation

Measured over five seeds, mean ± standard deviation, rank 8. Planted: squared error relative to what a concept adds.
Digits: wrong answers. "At 0.01" is the rate that all arms had where the design was tried first:

| columns of a concept | planted, at the best rate % | planted, at 0.01 % | digits, at the best rate % |
| --- | --- | --- | --- |
| slot | 2.1 ± 0.7 | 5.5 ± 0.5 | 71.7 ± 3.1 |
| random | 2.7 ± 1.6 | 11.2 ± 1.9 | 71.4 ± 6.0 |
| Gaussian | 2.4 ± 0.5 | 8.5 ± 1.9 | 68.2 ± 5.2 |
| LoRA, which learns both factors | 2.6 ± 1.2 | 15.5 ± 4.2 | 45.8 ± 5.6 |
| the same for all | 7.1 ± 3.7 | 243 ± 78 | 70.8 ± 3.3 |

Each planted concept alone is at 0.1 % or below. So orthogonal columns interfere less than shared ones, and at one rate
for all, slots interfere three times less than LoRA.

Claims that did not reproduce: that orthogonal columns merge better than LoRA where each arm has its best rate, since
large steps lengthen the tokens, which separates the concepts of every arm; and that it helps without a token that
learns. There inputs fill all columns, a frozen slot of them learns an order less well (6 % wrong alone, against 5),
and the sum of LoRAs is far better.

Source: Po, Yang, Aberman, Wetzstein, Orthogonal Adaptation for Modular Customization of Diffusion Models, 2024.
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
from experiments.tasks import digits_task, permuted_digits
from subspace_jax.methods.low_rank.orthogonal_adaptation import orthogonal_adaptation


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      inputs: of the planted layer.
      outputs: of it.
      concepts: trained apart and summed.
      rank: of each adapter.
      context: standard deviation of the inputs that concepts share.
      steps: optimizer steps of each concept.
      batch: contexts of a step.
      rates: learning rates of the planted concepts, for adapter and token.
      orders: orders of pixels that are learned apart.
      digit_steps: optimizer steps of each order.
      digit_rates: learning rates of the digits.
      weights: what summed adapters of the digits are multiplied with; the best counts.
      seeds: one layer, one network and one run of every arm per seed.
    """

    inputs: int = 128
    outputs: int = 64
    concepts: int = 8
    rank: int = 8
    context: float = 0.3
    steps: int = 600
    batch: int = 64
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    orders: int = 4
    digit_steps: int = 300
    digit_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    weights: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


def methods(rank: int, concept: int) -> dict[str, sj.Method]:
    """Returns every arm's method for one concept."""
    made = functools.partial(orthogonal_adaptation, rank, concept=concept)
    return {
        "slot": made(),
        "random": made(mode="random"),
        "gaussian": made(mode="gaussian"),
        "lora": sj.lora(rank),
        "shared": made(mode="shared"),
    }


def run(config: Config, context: Context) -> dict[str, Any]:
    """Runs both parts."""
    arms = list(methods(config.rank, 0))
    runs = []
    for name, rate in context.track([(n, r) for n in arms for r in config.rates], "planted concepts"):
        runs += [_planted(config, name, rate, seed) for seed in config.seeds]
    for name, rate in context.track([(n, r) for n in arms for r in config.digit_rates], "orders of pixels"):
        runs += [_digits(config, name, rate, seed) for seed in config.seeds]
    return {"runs": runs}


def _apart(params: Any, name: str, rank: int, count: int, seed: int, pattern: str) -> Any:
    """One adapter for each concept, in one tree with a leading axis of concepts."""
    made = []
    for i in range(count):
        key = jax.random.fold_in(jax.random.key(100 + seed), i)
        made.append(sj.adapt(params, {pattern: methods(rank, i)[name]}, key=key))
    return jax.tree.map(lambda *v: jnp.stack(v), *made)


def _one(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda v: v[i], tree)


use = sj.with_adapters(lambda params, x: x @ params["kernel"])


@functools.partial(jax.jit, static_argnames="config")
def _train(adapted: Any, tokens: jax.Array, targets: jax.Array, kernel: Any, keys: Any, config: Config, rate: float):
    """Trains all concepts beside each other, each with its token."""

    def one(adapted: Any, token: jax.Array, target: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
        trainable, frozen = sj.partition(adapted)
        optimizer = optax.adam(rate)

        def loss(learned: Any, x: jax.Array) -> jax.Array:
            found = use(sj.combine(learned[0], frozen), x + learned[1])
            return jnp.mean(jnp.sum((found - x @ kernel - target) ** 2, axis=-1))

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            learned, state = carry
            x = config.context * jax.random.normal(key, (config.batch, config.inputs))
            updates, state = optimizer.update(jax.grad(loss)(learned, x), state)
            return (optax.apply_updates(learned, updates), state), None

        start = (trainable, token)
        (learned, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), jax.random.split(key, config.steps))
        return sj.combine(learned[0], frozen), learned[1]

    return jax.vmap(one)(adapted, tokens, targets, keys)


def _planted(config: Config, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Squared errors of concepts alone and summed, relative to the size of what each should add."""
    keys = jax.random.split(jax.random.key(seed), 4)
    kernel = jax.random.normal(keys[0], (config.inputs, config.outputs)) / np.sqrt(config.inputs)
    token = jax.random.normal(keys[1], (config.inputs,))
    token = jnp.broadcast_to(token / jnp.linalg.norm(token), (config.concepts, config.inputs))
    targets = jax.random.normal(keys[2], (config.concepts, config.outputs))
    params = {"kernel": kernel}
    adapted = _apart(params, name, config.rank, config.concepts, seed, "kernel")
    trained, tokens = _train(adapted, token, targets, kernel, jax.random.split(keys[3], config.concepts), config, rate)
    apart = [_one(trained, i) for i in range(config.concepts)]
    merged = sj.merge(sj.merging.task_arithmetic(apart, params, weights=1.0))["kernel"]
    x = config.context * jax.random.normal(jax.random.key(1000 + seed), (512, config.inputs))

    def error(kernels: Sequence[jax.Array]) -> float:
        found = [(x + t) @ k - x @ kernel - v for k, t, v in zip(kernels, tokens, targets, strict=True)]
        return float(jnp.mean(jnp.square(jnp.stack(found))) / jnp.mean(targets**2))

    return {
        "method": f"planted: {name}",
        "learning_rate": rate,
        "seed": seed,
        "values": config.rank * (config.outputs + (config.inputs if name == "lora" else 0)),
        "error": error([merged] * config.concepts),
        "error_alone": error([sj.merge(one)["kernel"] for one in apart]),
    }


@functools.partial(jax.jit, static_argnames="steps")
def _fit(adapted: Any, keys: jax.Array, x: jax.Array, y: jax.Array, steps: int, rate: float) -> Any:
    """Learns all orders beside each other."""

    def one(adapted: Any, key: jax.Array, x: jax.Array) -> Any:
        def objective(adapted: Any, key: jax.Array) -> jax.Array:
            rows = jax.random.randint(key, (64,), 0, len(x))
            return digits_task.loss(adapted, x[rows], y[rows])

        return sj.training.scan_steps(objective, optax.adam(rate), adapted, jax.random.split(key, steps)).adapted

    return jax.vmap(one)(adapted, keys, x)


def _digits(config: Config, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Errors on orders of pixels, by adapters alone and by their sum with the best weight."""
    tasks = [permuted_digits.permuted(i, seed) for i in range(config.orders)]
    params = digits_task.pretrained(seed)
    adapted = _apart(params, name, config.rank, config.orders, seed, digits_task.HIDDEN)
    keys = jax.random.split(jax.random.key(200 + seed), config.orders)
    trained = _fit(adapted, keys, jnp.stack([t.x for t in tasks]), tasks[0].y, config.digit_steps, rate)
    apart = [_one(trained, i) for i in range(config.orders)]

    def error(trees: Sequence[Any]) -> float:
        return 1 - float(np.mean([_accuracy(t, d.x_test, d.y_test) for t, d in zip(trees, tasks, strict=True)]))

    sums = [sj.merge(sj.merging.task_arithmetic(apart, params, weights=w)) for w in config.weights]
    return {
        "method": f"digits: {name}",
        "learning_rate": rate,
        "seed": seed,
        "values": sj.summary(apart[0]).trainable,
        "error": min(error([one] * config.orders) for one in sums),
        "error_alone": error(apart),
    }


@jax.jit
def _accuracy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(digits_task.apply(params, x).argmax(-1) == y)


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns errors of every arm at its best rate, and of its sum at the rate that the planted design names."""
    header = ["arm", "values of a concept", "learning rate", "error of the sum %", "error alone %"]
    table = [[*header, "of the sum at rate 0.01 %"]]
    for name, best in best_runs(results["runs"], "error", smallest=True).items():
        table.append(
            [
                *(name, f"{best[0]['values']:,}", f"{best[0]['learning_rate']:g}"),
                with_spread([r["error"] for r in best]),
                with_spread([r["error_alone"] for r in best], 2),
                with_spread([r["error"] for r in results["runs"] if (r["method"], r["learning_rate"]) == (name, 1e-2)]),
            ]
        )
    return table


EXPERIMENT = Experiment(
    name="orthogonal_adaptation",
    claim="Adapters over disjoint columns of one basis, trained apart, add up with little interference.",
    config=Config,
    run=run,
    rows=rows,
    tuning=Tuning(key="error", smallest=True),
)
