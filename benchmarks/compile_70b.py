"""The model of `compile_7b` with the shape of Llama-2-70B, on 32 x 8 devices, as many as heads of keys allow."""

from __future__ import annotations

import dataclasses

from benchmarks import compile_7b
from benchmarks._benchmark import Benchmark


@dataclasses.dataclass(frozen=True)
class Config(compile_7b.Config):
    """Settings, as of `compile_7b`; the defaults have the shape of Llama-2-70B."""

    width: int = 8192
    heads: int = 64
    kv_heads: int | None = 8
    mlp_width: int = 28672
    layers: int = 80
    mesh: tuple[int, ...] = (32, 8)
    variants: tuple[str, ...] = (
        *("forward", "norms", "lora", "dora", "pissa", "osf", "galore", "dct", "full", "bank"),
        *("lora start", "pissa start"),
    )


BENCHMARK = Benchmark(
    name="compile_70b",
    claim="What a step of a 70B model holds, computes and sends on each device of a 32 x 8 mesh, compiled only.",
    config=Config,
    run=compile_7b.run,
    tables=compile_7b.tables,
    charts=compile_7b.charts,
)
