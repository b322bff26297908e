"""Training steps of a Llama in bfloat16 on one GPU: this library's and those of PyTorch PEFT, shape by shape."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from benchmarks._benchmark import Benchmark, Rows, number
from benchmarks._charts import Chart
from benchmarks._gpu_processes import Collected, Pair, collect, read_rows
from benchmarks._gpu_rows import COMPILE, FLASH, JOINED, PLUS, SHAPES, Task
from experiments.runner import human_bytes

OURS, PEFT = "subspace_jax", "PEFT"
MODULES = {OURS: "benchmarks._gpu_step", PEFT: "benchmarks._gpu_peft"}

# First what the goals are about: whatever there is time for, these are measured.
VARIANTS = {
    OURS: (
        "full",
        "lora",
        f"full{PLUS}{FLASH}",
        f"lora{PLUS}{FLASH}",
        f"lora{PLUS}{JOINED}",
        "dora",
        "oft",
        "randlora",
        "pissa",
        "project_orthogonal",
        "galore",
    ),
    PEFT: ("full", "lora", "dora", "oft", "randlora", f"lora{PLUS}{COMPILE}"),
}

# What a step may take: LoRA of full fine-tuning at this shape, and anything of eager PEFT's step.
OF_FULL = {"1B-8x1024": 0.45}
OF_PEFT = 0.8


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      shapes: those of SHAPES that are measured; `tiny` shows on any machine that the command runs.
      libraries: whose steps: subspace_jax, PEFT.
      variants: rows of each library; all if empty.
      rank: of the adapters, on all kernels of the layers.
      seconds: for which every row is timed.
      limit_seconds: for everything; rows for which no time is left are named in the notes.
    """

    shapes: tuple[str, ...] = ("1B-8x1024", "160M-16x128", "1B-1x512")
    libraries: tuple[str, ...] = (OURS, PEFT)
    variants: tuple[str, ...] = ()
    rank: int = 16
    seconds: float = 3.0
    limit_seconds: float = 480.0


def pairs(config: Config) -> list[Pair]:
    """Returns what is measured, in its order.

    Raises:
      SystemExit: a shape, library or variant is unknown.
    """
    known = list(dict.fromkeys(name for names in VARIANTS.values() for name in names))
    choices = {"shapes": list(SHAPES), "libraries": list(VARIANTS), "variants": known}
    for setting, names in choices.items():
        unknown = [name for name in getattr(config, setting) if name not in names]
        if unknown:
            raise SystemExit(f"{setting}={','.join(unknown)}: choose from {'; '.join(names)}.")
    chosen = config.variants or known
    return [
        Pair(shape, library, tuple(v for v in VARIANTS[library] if v in chosen))
        for shape in config.shapes
        for library in config.libraries
    ]


def run(config: Config, console: Console) -> dict[str, Any]:
    """Measures every shape and library in a process of its own, so that neither holds the other's memory."""

    def start(pair: Pair, variants: Sequence[str], seconds: float):
        console.print(f"{_title(pair.shape)}, {pair.library}: {'; '.join(variants)} ({seconds:.0f} s)")
        task = Task(pair.shape, tuple(variants), config.rank, config.seconds)
        # No other process is on the device; JAX takes three quarters of it unless told.
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
        return read_rows([sys.executable, "-m", MODULES[pair.library], task.text()], seconds, share)

    # This process does not look for a device before the others have ended: it would take its memory.
    found = collect(pairs(config), config.limit_seconds, start)
    return result(found, config.rank)


def result(found: Collected, rank: int) -> dict[str, Any]:
    """Returns what is written of the rows: with ratios, notes, devices and versions.

    Raises:
      SystemExit: no row was measured; the message says why.
    """
    missing = _missing(found)
    measured = [row for row in found.rows if "step_ms" in row]
    if not measured:
        errors = [f"{_of(row)}: {row['variant']} failed: {row['error']}" for row in found.rows]
        raise SystemExit("\n".join(["gpu: nothing was measured.", *missing, *errors]))
    times = {(row["shape"], row["library"], row["variant"]): row["step_ms"] for row in measured}
    for row in measured:
        references = {"of_full": (row["library"], _full(row["variant"]))}
        if row["library"] == OURS:
            references["of_peft"] = (PEFT, _peer(row["variant"]))
        for name, (library, variant) in references.items():
            if (row["shape"], library, variant) in times:
                row[name] = row["step_ms"] / times[row["shape"], library, variant]
    failed = [row for row in found.rows if "error" in row]
    notes = [
        f"A Llama with random weights in bfloat16, AdamW, rank {rank} on all kernels of the layers; the same sizes, "
        "batch, loss and rematerialization in both libraries. Steps are waited for one by one; times are medians, and "
        "the spread is the slowest less the fastest. What adapters learn is in float32 here, as it is by default, and "
        "in bfloat16 in PEFT, whose default of float32 is slower. Operations are those of matrix products, repeated "
        "ones among them and cuDNN's attention not; memory is what the compiler assigns here, and the most that was "
        "allocated there.",
        *missing,
        *(f"{_of(row)}: {row['variant']} failed: {' '.join(row['error'].split())}" for row in failed),
    ]
    by_library = {row["library"]: row for row in measured}
    return {
        "rows": found.rows,
        "left_out": found.left_out,
        "devices": {library: row["device"] for library, row in by_library.items()},
        "versions": {name: version for row in by_library.values() for name, version in row["versions"].items()},
        "notes": notes,
        "packages": ["torch", "peft", "transformers"],
    }


def _full(variant: str) -> str:
    """The full fine-tuning that a variant is compared with, which has the same attention."""
    return f"full{PLUS}{FLASH}" if FLASH in variant else "full"


def _peer(variant: str) -> str:
    """What PEFT does eagerly of a variant; a step of PiSSA is LoRA's, and its attention is always fused."""
    kind = variant.split(PLUS)[0]
    return {"pissa": "lora"}.get(kind, kind)


def _missing(found: Collected) -> list[str]:
    """A sentence for the rows of each pair that were left out for one reason."""
    names: dict[tuple[str, str], list[str]] = {}
    for row in found.left_out:
        names.setdefault((_of(row), row["reason"]), []).append(row["variant"])
    return [f"{pair}: left out, {reason}: {'; '.join(variants)}." for (pair, reason), variants in names.items()]


def _of(row: Mapping[str, Any]) -> str:
    return f"{_title(row['shape'])}, {row['library']}"


def _title(shape: str) -> str:
    return shape.replace("-", " ")


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """For each shape the times, with ratios beside what they may be, and what a step takes and holds."""
    shapes: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        shapes.setdefault(row["shape"], {}).setdefault(row["variant"], {})[row["library"]] = row
    found = []
    for shape, variants in shapes.items():
        found.append((f"A step of {_title(shape)}", _times(OF_FULL.get(shape), variants)))
        found.append((f"What a step of {_title(shape)} takes and holds", _sizes(variants)))
    return found


def _times(goal: float | None, variants: Mapping[str, Mapping[str, Any]]) -> Rows:
    goals = [] if goal is None else [f"at most {goal:.2f}"]
    rows = [
        ["variant", "ms", "spread", "of full", *goals, "PEFT's ms", "spread", "of PEFT's", f"at most {OF_PEFT:.2f}"]
    ]
    for name, both in variants.items():
        ours, theirs = both.get(OURS, {}), both.get(PEFT, {})
        of_full, of_peft = ours.get("of_full"), ours.get("of_peft")
        judged = [] if goal is None else [_met(of_full if name.startswith("lora") else None, goal)]
        compared = [number(of_peft, absent=""), _met(of_peft, OF_PEFT)]
        rows.append(
            [name, *_milliseconds(ours), number(of_full, absent=""), *judged, *_milliseconds(theirs), *compared]
        )
    return rows


def _milliseconds(row: Mapping[str, Any]) -> list[str]:
    if "error" in row:
        return ["failed", ""]
    return [number(row.get("step_ms"), absent=""), number(row.get("spread_ms"), absent="")]


def _sizes(variants: Mapping[str, Mapping[str, Any]]) -> Rows:
    rows = [
        [
            "variant",
            "trained",
            "tokens/s",
            "memory",
            "TFLOP/s",
            "operations, of full",
            "PEFT's tokens/s",
            "PEFT's memory",
        ]
    ]
    for name, both in variants.items():
        ours, theirs = both.get(OURS, {}), both.get(PEFT, {})
        full = variants.get(_full(name), {}).get(OURS, {})
        operations = ours["flops"] / full["flops"] if "flops" in ours and "flops" in full else None
        values = {**theirs, **ours}.get("trainable_values")
        trained = "" if values is None else f"{values:,}"
        rate = ours["flops"] / ours["step_ms"] / 1e9 if "flops" in ours else None
        rows.append(
            [
                name,
                trained,
                *_speed(ours),
                number(rate, 1, absent=""),
                number(operations, 3, absent=""),
                *_speed(theirs),
            ]
        )
    return rows


def _speed(row: Mapping[str, Any]) -> list[str]:
    speed = f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else ""
    return [speed, human_bytes(row["bytes"]) if "bytes" in row else ""]


def _met(ratio: float | None, goal: float) -> str:
    return "" if ratio is None else "yes" if ratio <= goal else "no"


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """Step times by shape."""
    drawn: dict[str, dict[str, dict[str, float]]] = {}
    for row in results["rows"]:
        if "step_ms" in row:
            bars = drawn.setdefault(row["shape"], {})
            bars.setdefault(row["variant"], {})[row["library"]] = row["step_ms"]
    return [Chart(f"a step of {_title(shape)}", "milliseconds", bars) for shape, bars in drawn.items()]


BENCHMARK = Benchmark(
    name="gpu",
    claim="How long steps of a Llama take on one GPU, here and in PyTorch PEFT, with cuDNN's attention and without.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
    device="gpu",
)
