"""One batch whose rows use different adapters, beside a call for each adapter and beside merged copies."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import subspace_jax as sj
from benchmarks._benchmark import Benchmark, Rows
from benchmarks._charts import Chart
from benchmarks._measure import combined, cost, interleaved, paired_ratio
from experiments.runner import human_bytes

ONE = "one LoRA for all rows"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      width: of the square kernels.
      layers: number of them, one after the other with tanh between.
      length: tokens of a row.
      batch: rows.
      rank: of every adapter.
      adapters: numbers of adapters in the batch.
      rounds: timed runs of each way, one after the other in every round.
    """

    width: int = 512
    layers: int = 4
    length: int = 32
    batch: int = 64
    rank: int = 8
    adapters: tuple[int, ...] = (1, 8, 64)
    rounds: int = 10


def model(params: Any, x: jax.Array) -> jax.Array:
    """Returns the output of all layers."""
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return x


class _Runner:
    """Runs compiled calls of one way, several for each batch where a call serves one adapter."""

    def __init__(self, function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls
        self.cost, self.program = cost(function, calls[0])
        held = {id(leaf): leaf for call in calls for leaf in jax.tree.leaves(call)}
        self.held_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in held.values())
        self.seconds: list[float] = []

    def run(self) -> None:
        start = time.perf_counter()
        jax.block_until_ready([self.program(*call) for call in self.calls])
        self.seconds.append(time.perf_counter() - start)


def runners(config: Config, count: int) -> dict[str, _Runner]:
    """Returns every way to answer one batch in which each of `count` adapters has its share of the rows."""
    keys = jax.random.split(jax.random.key(0), config.layers)
    draw = jax.nn.initializers.orthogonal()
    params = {f"layer_{i}": draw(key, (config.width, config.width)) for i, key in enumerate(keys)}
    x = jax.random.normal(jax.random.key(1), (config.batch, config.length, config.width))
    made = [sj.adapt(params, {"*": sj.lora(config.rank)}, key=jax.random.key(i)) for i in range(count)]
    parts = jnp.split(x, count)
    apply = sj.with_adapters(model)
    rows = jnp.repeat(jnp.arange(1, count + 1), config.batch // count)
    return {
        ONE: _Runner(apply, [(made[0], x)]),
        "a bank": _Runner(sj.per_row(model), [(sj.bank(params, made), rows, x)]),
        "a call for each adapter": _Runner(apply, list(zip(made, parts, strict=True))),
        "merged copies": _Runner(model, list(zip(map(sj.merge, made), parts, strict=True))),
    }


def run(config: Config, console: Console) -> dict[str, Any]:
    """Measures all ways in turns, for every number of adapters."""
    found: dict[str, Any] = {}
    for count in config.adapters:
        console.print(f"  {count} adapters")
        ways = runners(config, count)
        interleaved(list(ways.values()), config.rounds)
        for name, runner in ways.items():
            found[f"{name}, {count}"] = {
                "way": name,
                "adapters": count,
                "call": combined([runner.cost]),
                "calls": len(runner.calls),
                "held_bytes": runner.held_bytes,
                "seconds": runner.seconds,
                "ratios": {
                    "flops": len(runner.calls) * runner.cost.flops / ways[ONE].cost.flops,
                    "seconds": paired_ratio(runner.seconds, ways[ONE].seconds),
                },
            }
    note = (
        "Operations are the compiled programs', of all calls of a batch; bytes are those of parameters, adapters and "
        "inputs held. Time ratios are medians over rounds in which all ways ran one after the other."
    )
    return {"ways": found, "order": list(found), "notes": [note]}


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """One table of all ways."""
    rows = [["way", "adapters", "GFLOP", "of one LoRA", "ms", "of one LoRA", "held"]]
    for name in results["order"]:
        values = results["ways"][name]
        rows.append(
            [
                values["way"],
                str(values["adapters"]),
                f"{values['calls'] * values['call']['flops'] / 1e9:.2f}",
                f"{values['ratios']['flops']:.3f}",
                f"{1e3 * statistics.median(values['seconds']):.1f}",
                f"{values['ratios']['seconds']:.2f}",
                human_bytes(values["held_bytes"]),
            ]
        )
    return [("one batch", rows)]


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """Operations and time of every way."""
    ratios = {name: results["ways"][name]["ratios"] for name in results["order"]}
    bars = {name: {"operations": r["flops"], "time": r["seconds"]} for name, r in ratios.items()}
    return [Chart("one batch with several adapters", "relative to one LoRA for all rows", bars, reference=1.0)]


BENCHMARK = Benchmark(
    name="adapter_bank",
    claim="What a batch costs whose rows use different adapters: a bank, a call for each adapter, merged copies.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
