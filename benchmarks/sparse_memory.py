"""What a step of sparse tuning holds: matrices formed one layer at a time, beside LoRA and a stored mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from benchmarks import memory
from benchmarks._benchmark import Benchmark, Rows
from benchmarks._charts import Chart
from experiments.runner import human_bytes


@dataclasses.dataclass(frozen=True)
class Config(memory.Config):
    """Settings: those of the benchmark "memory", of which shapes and budgets are not used, and these.

    Attributes:
      layers: numbers of layers, few first.
    """

    vocabulary: int = 2000
    length: int = 256
    methods: tuple[str, ...] = ("lora", "snell", "snella", "lift", "dense, masked", "full")
    layers: tuple[int, ...] = (4, 16)
    compared: str = "0.35B"


def run(config: Config, console: Console) -> dict[str, Any]:
    """Compiles a step of every method on a scanned and rematerialized Llama of each depth."""
    compiler = memory.Compiler(config, console)
    found = {
        name: {str(layers): compiler.measure(name, config.compared, layers) for layers in config.layers}
        for name in config.methods
    }
    notes = [
        f"A Llama of the shape {config.compared} with scanned, rematerialized layers, rank {config.rank}, "
        f"{config.sequences} x {config.length} tokens, compiled for one device and not run. What is held beside the "
        "model's own parameters in bfloat16: what learns, the optimizer's state, temporaries and outputs. `a layer "
        f"more` is the difference of {config.layers[0]} and {config.layers[-1]} layers, by layer. `dense, masked` "
        "stores a mask of every kernel and masks dense gradients, with dense moments.",
    ]
    return {"measured": found, "layers": list(config.layers), "notes": notes}


def _beside(one: Mapping[str, int]) -> int:
    """Bytes beside the parameters of the model, in bfloat16."""
    return one["bytes"] - 2 * one["parameters"]


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """Bytes beside the model, and how they grow with depth."""
    few, many = results["layers"][0], results["layers"][-1]
    rows = [["method", "held beside the model", "of LoRA's", "temporaries", "a layer more"]]
    lora = _beside(results["measured"]["lora"][str(many)])
    for name, found in results["measured"].items():
        held = [_beside(found[str(layers)]) for layers in (few, many)]
        growth = (held[1] - held[0]) / (many - few)
        temporaries = human_bytes(found[str(many)]["temporary_bytes"])
        rows.append([name, human_bytes(held[1]), f"{held[1] / lora:.2f}", temporaries, human_bytes(growth)])
    return [(f"{many} layers", rows)]


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """Bytes beside the model by method."""
    many = str(results["layers"][-1])
    bars = {name: {"MiB": _beside(found[many]) / 2**20} for name, found in results["measured"].items()}
    return [Chart(f"{many} layers", "MiB held beside the model", bars)]


BENCHMARK = Benchmark(
    name="sparse_memory",
    claim="What a step of kernelized sparse tuning holds, beside LoRA's and that of a stored mask.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
