"""A 7-billion-parameter model compiled ahead of time for a pod: bytes, operations and collectives of each method."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks._benchmark import Benchmark, Rows
from benchmarks._charts import Chart
from experiments.runner import human_bytes

KEYS = ("count", "bytes")
# A matrix that is moved is a weight; one that is summed over devices is a gradient.
MOVES = ("all-gather", "all-to-all", "collective-permute")
SUMS = ("all-reduce", "reduce-scatter")
WITHOUT_FROZEN_KERNELS = ("galore", "dct", "full")
# Ends the names of variants that compile what `adapt` does, instead of a step.
START = " start"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; the defaults have the shape of Llama-7B.

    Attributes:
      sequences: sequences in a batch, over all devices.
      length: tokens in a sequence.
      kv_heads: heads of keys and values; `heads` if None.
      rank: of LoRA, DoRA, PiSSA and the bank's adapters, and the budget of LIFT as such a rank.
      directions: of GaLore and DCT-Adam in each matrix.
      adapters: in the bank.
      mesh: devices along "data" and "model".
      variants: what is compiled, one after the other; "pissa start" is what `adapt` does.
    """

    vocabulary: int = 32000
    width: int = 4096
    heads: int = 32
    kv_heads: int | None = None
    mlp_width: int = 11008
    layers: int = 32
    remat: bool = True
    sequences: int = 32
    length: int = 2048
    rank: int = 16
    directions: int = 128
    adapters: int = 64
    mesh: tuple[int, ...] = (16, 16)
    variants: tuple[str, ...] = (
        *("forward", "norms", "lora", "dora", "pissa", "lift", "lift_blocks", "osf", "galore", "dct", "full", "bank"),
        *("lora start", "pissa start"),
    )


def run(config: Config, console: Console) -> dict[str, Any]:
    """Compiles every variant in a process of its own, whose number of devices is fixed when it starts."""
    if len(config.mesh) != 2:
        raise SystemExit(f"mesh={config.mesh}; expected two sizes, of data and model.")
    devices = config.mesh[0] * config.mesh[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    measured = {}
    for variant in config.variants:
        settings = json.dumps(dataclasses.asdict(config))
        command = [sys.executable, "-m", "benchmarks._compile_program", settings, variant]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{variant} failed:\n{done.stderr[-3000:]}")
        measured[variant] = json.loads(done.stdout.splitlines()[-1])
        seconds = measured[variant]["compile_seconds"]
        console.print(f"  {variant}: compiled for {devices} devices in {seconds:.0f} s")
    return {"measured": measured, "order": list(measured), "notes": _notes(measured)}


def _notes(measured: Mapping[str, Any]) -> list[str]:
    notes = [
        "All bytes and operations are of one device; nothing is allocated or run. Arguments are the base (in bfloat16 "
        "except what learns), the optimizer's state and the batch. Temporaries and the dtype of some collectives are "
        "those of the CPU compiler, which computes bfloat16 products in float32: an upper bound for accelerators. "
        "Operations are those of matrix products, loops counted as often as they run; so are collectives, whose bytes "
        "are those of their results.",
        "`norms` trains the scales of the norms alone: its step sends what any backward pass through the frozen "
        "matrices needs. A collective is one on a matrix if its result has the shape of one of the base, whole or "
        "split over one axis of the mesh only; gradients of matrices have the same shapes and are summed.",
    ]
    for name, values in measured.items():
        beside = "forward" if name == "bank" else "norms"
        least = measured.get(beside)
        if name.endswith(START):
            count, size = (_of_matrices(values, MOVES)[key] for key in KEYS)
            notes.append(f"`{name}` gathers {count} matrices of the base, {size / 2**30:.2f} GiB.")
        elif least is not None and name not in ("forward", "norms", *WITHOUT_FROZEN_KERNELS):
            count, size = (_of_matrices(values, MOVES)[key] - _of_matrices(least, MOVES)[key] for key in KEYS)
            more = f"{count:+d} collectives, {size / 2**30:+.2f} GiB"
            notes.append(f"`{name}` moves frozen matrices by {more} against `{beside}`.")
    return notes


def _of_matrices(values: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, int]:
    """Count and bytes of the collectives of some kinds on matrices of the base's shapes."""
    return {key: sum(values["of_weights"][kind][key] for kind in kinds) for key in KEYS}


def tables(results: Mapping[str, Any]) -> Sequence[tuple[str, Rows]]:
    """Returns memory and operations, and collectives."""
    measured = {name: results["measured"][name] for name in results["order"]}
    return [("Memory and operations of one device", _memory(measured)), ("Collectives of a step", _sent(measured))]


def _memory(measured: Mapping[str, Any]) -> Rows:
    rows = [
        ["variant", "trainable", "arguments", "frozen", "learned", "optimizer", "temporaries", "TFLOP", "compile s"]
    ]
    for name, values in measured.items():
        sizes = [
            human_bytes(values[f"{key}_bytes"]) for key in ("argument", "frozen", "trainable", "optimizer", "temporary")
        ]
        trainable = f"{values.get('trainable_values', 0):,}"
        rows.append([name, trainable, *sizes, f"{values['flops'] / 1e12:.3f}", f"{values['compile_seconds']:.0f}"])
    return rows


def _sent(measured: Mapping[str, Any]) -> Rows:
    kinds = list(next(iter(measured.values()))["collectives"])
    rows = [["variant", *kinds, "matrices moved", "matrices summed"]]
    for name, values in measured.items():
        cells = [values["collectives"][kind] for kind in kinds]
        matrices = (_of_matrices(values, found) for found in (MOVES, SUMS))
        rows.append([name, *(_cell(cell) for cell in (*cells, *matrices))])
    return rows


def _cell(found: Mapping[str, int]) -> str:
    return f"{found['count']}: {human_bytes(found['bytes'])}" if found["count"] else "-"


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """What one device holds between steps, and what it sends and receives in one."""
    measured = {name: results["measured"][name] for name in results["order"]}
    parts = {"frozen": "frozen", "learned": "trainable", "optimizer": "optimizer"}
    held = {name: {part: v[f"{key}_bytes"] / 2**20 for part, key in parts.items()} for name, v in measured.items()}
    kinds = ("all-gather", "all-reduce")
    sent = {name: {kind: v["collectives"][kind]["bytes"] / 2**30 for kind in kinds} for name, v in measured.items()}
    return [Chart("held by one device", "MiB", held), Chart("collectives of one step", "GiB on one device", sent)]


BENCHMARK = Benchmark(
    name="compile_7b",
    claim="What a step of a 7B model holds, computes and sends on each device of a 16 x 16 mesh, compiled only.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
