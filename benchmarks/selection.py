"""Selecting training examples by gradients: what GIST computes and keeps of an example, beside LESS."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import subspace_jax as sj
from benchmarks._benchmark import Benchmark, Rows
from benchmarks._charts import Chart
from benchmarks._measure import cost
from experiments.runner import human_bytes
from subspace_jax.data import load_text_task
from subspace_jax.methods.analysis.gist import example_gradients, fit_subspace, score_examples
from subspace_jax.models import add_classifier, load_minilm
from subspace_jax.training import scan_steps

# Rows of LESS's random matrix that are drawn at a time: the whole has 8,192 for every value that learns.
_ROWS = 2048
LESS = "LESS"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      pool: reviews to select from.
      validation: reviews of the target.
      length: tokens of a review.
      rank: of LoRA, on all kernels of the encoder.
      warmup: steps before gradients are taken.
      directions: of LESS's random projection, a multiple of 32.
      checkpoints: at which LESS takes gradients; GIST takes one.
      batch_size: gradients that are in memory at a time.
    """

    pool: int = 128
    validation: int = 64
    length: int = 32
    rank: int = 8
    warmup: int = 20
    directions: int = 8192
    checkpoints: int = 4
    batch_size: int = 32


def run(config: Config, console: Console) -> dict[str, Any]:
    """Fits GIST's subspace, and scores the pool by gradients alone, by GIST and by LESS at one checkpoint."""
    minilm = load_minilm()
    task = load_text_task(
        "rotten_tomatoes",
        tokenizer=minilm.load_tokenizer(),
        max_length=config.length,
        train_size=config.pool,
        eval_size=config.validation,
    )
    classifier = add_classifier(minilm, 2, jax.random.key(0))
    module = classifier.module
    rules = {"backbone/encoder/**/kernel": sj.lora(config.rank)}
    adapted = sj.adapt(classifier.params, rules, key=jax.random.key(1))
    apply = sj.with_adapters(lambda p, e: module.apply({"params": p}, e["tokens"][None], e["mask"][None])[0])
    pool = _examples(task, "train", config.pool)
    adapted = _warmed(apply, adapted, pool, config.warmup)
    params, frozen = sj.partition(adapted)

    def loss(params: Any, example: Any) -> jax.Array:
        logits = apply(sj.combine(params, frozen), example)
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["labels"])

    validation = _examples(task, "validation", config.validation)
    console.print("fitting the subspace")
    target, fit = _timed(lambda: fit_subspace(loss, params, validation))
    batch = jax.tree.map(lambda v: v[: config.batch_size], pool)
    values = sum(v.size for v in jax.tree.leaves(params))
    less = _less(loss, config.directions)
    ways: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], float]] = {
        "gradients alone": (
            lambda one: _sizes(example_gradients(loss, params, one)),
            lambda one: _sizes(example_gradients(loss, params, one)),
            4 * values,
        ),
        "GIST": (
            lambda one: score_examples(loss, params, target, one, batch_size=config.batch_size).scores,
            lambda one: _inner_products(example_gradients(loss, params, one), target.basis),
            4 * target.rank,
        ),
        LESS: (lambda one: less(params, one), lambda one: less(params, one), 4 * config.directions),
    }
    found = {}
    for name, (whole, program, kept) in ways.items():
        console.print(f"scoring by {name}")
        flops = cost(program, (batch,))[0].flops / config.batch_size
        jax.block_until_ready(whole(batch))  # compiles
        seconds = _timed(lambda whole=whole: _in_batches(whole, pool, config.batch_size))[1]
        found[name] = {"flops": flops, "seconds": seconds / config.pool, "bytes": kept}
    notes = [
        f"MiniLM with LoRA of rank {config.rank} on all kernels: {values:,} values learn. {config.validation} film "
        f"reviews of the target span {target.rank} directions for 95 % of their energy; fitting took {fit:.1f} s with "
        f"compilation. An example is a review of {config.length} tokens. LESS is as its paper has it: gradients "
        "divided by the roots of second moments (here of the batch), "
        f"projected by random signs to {config.directions:,} numbers (drawn in blocks, once for {config.batch_size} "
        f"gradients), at {config.checkpoints} checkpoints where GIST needs one. XLA counts a scan's body once; the "
        "operations of LESS's projection are therefore its arithmetic, two for every sign and example.",
    ]
    sizes = {"values": values, "rank": target.rank, "directions": config.directions, "checkpoints": config.checkpoints}
    return {"ways": found, **sizes, "fit_seconds": fit, "notes": notes}


def _examples(task: Any, split: str, count: int) -> dict[str, jax.Array]:
    batch = next(iter(task.batches(split, count, shuffle=False)))
    return {name: jnp.asarray(batch[name]) for name in ("tokens", "mask", "labels")}


def _warmed(apply: Any, adapted: Any, pool: Any, steps: int) -> Any:
    """At LoRA's start one factor's gradient is zero."""

    def loss(adapted: Any, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (16,), 0, len(pool["labels"]))
        batch = jax.tree.map(lambda v: v[rows], pool)
        logits = jax.vmap(apply, in_axes=(None, 0))(adapted, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    return scan_steps(loss, optax.adam(3e-4), adapted, jax.random.split(jax.random.key(2), steps)).adapted


def _less(loss: Any, directions: int) -> Callable[[Any, Any], jax.Array]:
    """Adam's division and the projection by random signs, whose matrix is never in memory whole."""

    @jax.jit
    def project(params: Any, batch: Any) -> jax.Array:
        gradients = [g.reshape(len(g), -1) for g in jax.tree.leaves(example_gradients(loss, params, batch))]
        flat = jnp.concatenate([g / (jnp.sqrt(jnp.mean(g * g, 0)) + 1e-8) for g in gradients], axis=1)
        blocks = -(-flat.shape[1] // _ROWS)
        flat = jnp.pad(flat, ((0, 0), (0, blocks * _ROWS - flat.shape[1])))
        parts = jnp.moveaxis(flat.reshape(len(flat), blocks, _ROWS), 1, 0)

        def step(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
            block, rows = part
            # Thirty-two signs of every drawn number: drawing one by one would cost more than the product.
            bits = jax.random.bits(jax.random.fold_in(jax.random.key(3), block), (_ROWS, directions // 32))
            signs = (bits[:, :, None] >> jnp.arange(32, dtype=bits.dtype)) & 1
            return total + rows @ (2.0 * signs.reshape(_ROWS, directions).astype(rows.dtype) - 1.0), None

        return jax.lax.scan(step, jnp.zeros((len(flat), directions)), (jnp.arange(blocks), parts))[0]

    return project


def _sizes(gradients: Any) -> jax.Array:
    """Norms, so that nothing is kept of a gradient and none is left out."""
    return sum((jnp.sum(g * g, axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(gradients)), jnp.zeros(()))


def _inner_products(gradients: Any, basis: Any) -> jax.Array:
    parts = zip(jax.tree.leaves(gradients), jax.tree.leaves(basis), strict=True)
    return sum((g.reshape(len(g), -1) @ p.reshape(len(p), -1).T for g, p in parts), jnp.zeros(()))


def _in_batches(function: Callable[[Any], Any], pool: Any, size: int) -> None:
    for first in range(0, len(pool["labels"]), size):
        jax.block_until_ready(function(jax.tree.map(lambda v, i=first: v[i : i + size], pool)))


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def _of_less(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Every way's costs of one example, LESS's at all its checkpoints, and their shares of LESS's."""
    ways = results["ways"]
    times = {name: results["checkpoints"] if name == LESS else 1 for name in ways}
    extra = {name: 2.0 * results["values"] * results["directions"] if name == LESS else 0.0 for name in ways}
    whole = {
        name: {
            "flops": times[name] * (one["flops"] + extra[name]),
            "seconds": times[name] * one["seconds"],
            "bytes": times[name] * one["bytes"],
        }
        for name, one in ways.items()
    }
    return {name: one | {f"{k} of LESS": v / whole[LESS][k] for k, v in one.items()} for name, one in whole.items()}


def tables(results: Mapping[str, Any]) -> Sequence[tuple[str, Rows]]:
    """What is computed and kept of one example of the pool."""
    rows = [["way", "GFLOP", "of LESS", "ms", "of LESS", "kept", "of LESS", "of a gradient"]]
    gradient = results["ways"]["gradients alone"]["bytes"]
    for name, one in _of_less(results).items():
        cells = [f"{one['flops'] / 1e9:.2f}", f"{100 * one['flops of LESS']:.1f} %", f"{1e3 * one['seconds']:.1f}"]
        cells += [f"{100 * one['seconds of LESS']:.1f} %", human_bytes(int(one["bytes"]))]
        rows.append([name, *cells, f"{100 * one['bytes of LESS']:.2f} %", f"{100 * one['bytes'] / gradient:.3g} %"])
    return [("one example of the pool", rows)]


def charts(results: Mapping[str, Any]) -> Sequence[Chart]:
    """Shares of LESS's costs."""
    keys = ("flops", "seconds", "bytes")
    shares = {name: {key: one[f"{key} of LESS"] for key in keys} for name, one in _of_less(results).items()}
    bars = {name: one for name, one in shares.items() if name != "gradients alone"}
    return [Chart("one example of the pool", "of LESS", bars)]


BENCHMARK = Benchmark(
    name="selection",
    claim="What selecting training examples by gradients computes and keeps of each, GIST beside LESS.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
