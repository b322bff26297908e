"""A step of a pretrained MiniLM here and in PyTorch PEFT, method by method: same weights, batch and loss."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks._benchmark import Benchmark, Rows, number
from benchmarks._charts import Chart
from benchmarks._measure import paired_ratio
from benchmarks._peft_steps import COMPILED, FULL, METHODS, Steps
from subspace_jax.cli.doctor import KEEP_MEMORY

# glibc then keeps what a step frees; by its defaults every step faults its temporaries in anew, in both libraries.
MEMORY = {"kept": {"GLIBC_TUNABLES": KEEP_MEMORY}, "default": {}}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      sequences: sequences in the batch.
      length: tokens in a sequence.
      rank: of LoRA, DoRA and PiSSA, on all kernels of the encoder.
      methods: those of METHODS that are measured; all if empty.
      rounds: timed steps of each, interleaved.
      threads: numbers of threads, of both libraries; a process for each.
      memory: "kept" and "default": what the allocator does with memory that a step frees; a process for each.
      compile_peft: whether to measure PEFT's model of the first method under `torch.compile` too.
    """

    sequences: int = 16
    length: int = 64
    rank: int = 8
    methods: tuple[str, ...] = ()
    rounds: int = 10
    threads: tuple[int, ...] = (2, 1)
    memory: tuple[str, ...] = ("kept", "default")
    compile_peft: bool = True


def run(config: Config, console: Console) -> dict[str, Any]:
    """Measures both libraries, one step after the other, in a process for each number of threads and allocator."""
    for name, given, known in (("methods", config.methods, METHODS), ("memory", config.memory, MEMORY)):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise SystemExit(f"{name}={','.join(unknown)}: choose from {', '.join(known)}.")
    methods = config.methods or tuple(METHODS)
    settings, absent = {}, {}
    for threads in config.threads:
        for memory in config.memory:
            title = f"{threads} thread{'s' if threads > 1 else ''}, memory {memory}"
            console.print(f"  {title}: {config.rounds} rounds of {', '.join(methods)}")
            shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(Steps) if f.name != "threads"}
            steps = Steps(**{**shared, "methods": methods, "threads": threads})
            found = _process(steps, MEMORY[memory])
            absent |= found["absent"]
            settings[title] = _ratios(found["measured"])
    notes = [
        f"Same pretrained weights, batch of {config.sequences} x {config.length} tokens, loss and Adam on the same "
        "kernels; JAX compiled once, PyTorch eager but for the row of torch.compile. Ratios are medians over rounds in "
        "which all ran one after the other. Full fine-tuning here joins tokens as LoRA does, which makes it a quarter "
        "faster and LoRA's share of it larger. `kept` is GLIBC_TUNABLES="
        + KEEP_MEMORY
        + " for both libraries: `faults` are "
        "pages that the system had to hand out in a step, `system` its time for them. RandLoRA's sizes are PEFT's "
        "defaults; OSF freezes half of the singular triples. Goals: of eager PEFT's time at most 0.75 for LoRA on two "
        "threads, 0.8 on one, 0.9 for every other method and for LoRA beside torch.compile.",
        *(f"{name}: absent, {reason}." for name, reason in absent.items()),
    ]
    return {
        **{"settings": settings, "methods": list(methods), "notes": notes},
        "packages": ["torch", "peft", "transformers"],
    }


def _process(steps: Steps, environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs one process; its environment decides on the allocator before Python starts."""
    clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    clean |= {"OMP_NUM_THREADS": str(steps.threads), "OPENBLAS_NUM_THREADS": str(steps.threads)}
    command = [sys.executable, "-m", "benchmarks._peft_steps", json.dumps(dataclasses.asdict(steps))]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], env=clean | environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def _ratios(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Everything measured, with each way's time relative to PEFT's and to LoRA's in the same library."""
    found = {}
    for name, one in measured.items():
        is_theirs = ", PEFT" in name
        others = {"of_peft": f"{name}, PEFT", "of_compiled": f"{name}, PEFT{COMPILED}"} if not is_theirs else {}
        others["of_lora"] = "lora, PEFT" if is_theirs else "lora"
        ratios = {k: paired_ratio(one["seconds"], measured[o]["seconds"]) for k, o in others.items() if o in measured}
        found[name] = one | ratios
    return found


def _goal(name: str, title: str) -> str:
    if name == FULL:
        return ""
    return ("0.80" if title.startswith("1 ") else "0.75") if name == "lora" else "0.90"


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """Two tables for each process: times, and what starting and the system take."""
    head = ["method", "ms", "PEFT's", "of PEFT's", "goal", "of torch.compile's", "of our LoRA", "PEFT's, of its LoRA"]
    other = ["method", "trained", "PEFT's", "start, s", "PEFT's", "faults", "PEFT's", "system, ms", "PEFT's"]
    found = []
    for title, measured in results["settings"].items():
        times, rest = [head], [other]
        for name in (FULL, *results["methods"]):
            both = [measured[name], measured.get(f"{name}, PEFT", {})]
            row = [name, *(_median(one, "seconds", 1e3) for one in both), number(both[0].get("of_peft"), absent="")]
            row += [_goal(name, title), number(both[0].get("of_compiled"), absent="")]
            times.append([*row, *(number(one.get("of_lora"), absent="") for one in both)])
            row = [name, *(f"{one['trainable_values']:,}" if one else "" for one in both)]
            row += [number(one.get("start_seconds"), absent="") for one in both]
            row += [_median(one, "faults", 1, 0) for one in both] + [_median(one, "system", 1e3, 0) for one in both]
            rest.append(row)
        found += [(title, times), (f"{title}: starts, and what the system does in a step", rest)]
    return found


def _median(one: Mapping[str, Any], name: str, factor: float, digits: int = 1) -> str:
    return f"{factor * statistics.median(one[name]):,.{digits}f}" if one else ""


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """Step times of the first process, and their shares of PEFT's in all."""
    first = next(iter(results["settings"].values()))
    times: dict[str, dict[str, float]] = {}
    for name in (FULL, *results["methods"]):
        both = {"subspace_jax": first[name], "PEFT": first.get(f"{name}, PEFT")}
        times[name] = {who: 1e3 * statistics.median(one["seconds"]) for who, one in both.items() if one}
    shares = {
        name: {title: m[name]["of_peft"] for title, m in results["settings"].items() if "of_peft" in m[name]}
        for name in (FULL, *results["methods"])
    }
    return [
        Chart(f"a step of MiniLM, {next(iter(results['settings']))}", "milliseconds", times),
        Chart("the same", "relative to PEFT", shares, reference=1.0),
    ]


BENCHMARK = Benchmark(
    name="peft_minilm",
    claim="How long steps of a pretrained MiniLM take here and in PyTorch PEFT on the same CPU, method by method.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
