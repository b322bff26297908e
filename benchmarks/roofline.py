"""Where steps lie between the machine's two limits: operations against bytes, here and in PyTorch PEFT."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import subspace_jax as sj
from benchmarks._benchmark import Benchmark, Rows
from benchmarks._charts import Roofline
from benchmarks._measure import fastest, interleaved
from benchmarks._peft_steps import FULL, METHODS, Batch, JaxRun, PeftRun, Steps
from experiments.runner import environment


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      sequences: sequences in the batch.
      length: tokens in a sequence.
      rank: of LoRA, DoRA and PiSSA, on all kernels of MiniLM's encoder.
      methods: those of `peft_minilm`; all if empty.
      rounds: timed steps of each, interleaved.
      side: of the square matrices whose product gives the limit of operations.
      values: of the array whose copy gives the limit of bytes.
    """

    sequences: int = 16
    length: int = 64
    rank: int = 8
    methods: tuple[str, ...] = ()
    rounds: int = 10
    side: int = 2048
    values: int = 2**26


def run(config: Config, console: Console) -> dict[str, Any]:
    """Measures the limits, and the steps one after the other."""
    unknown = sorted(set(config.methods) - set(METHODS))
    if unknown:
        raise SystemExit(f"methods={','.join(unknown)}: choose from {', '.join(METHODS)}.")
    chosen = config.methods or tuple(METHODS)
    shared = {name: getattr(config, name) for name in ("sequences", "length", "rank", "rounds")}
    steps = Steps(**shared, methods=chosen, threads=environment()["cores"], compile_peft=False)
    batch = Batch.of(steps)
    console.print("  the machine's limits")
    limits = {"flops": _most_flops(config.side), "bytes": _most_bytes(config.values)}
    runs: list[Any] = [JaxRun(FULL, sj.full(), batch)]
    absent = {}
    for name in (FULL, *chosen):
        console.print(f"  {name}")
        peers = METHODS.get(name)
        if peers is not None:
            runs.append(JaxRun(name, peers.ours(config.rank), batch, peers))
        try:
            runs.append(PeftRun(name, peers, steps, batch))
        except ImportError as error:
            absent[f"{name}, PEFT"] = f"not installed: {error.name}"
    counts = {one.name: _counted(one) for one in runs}
    interleaved(runs, config.rounds)
    found = {one.name: {**counts[one.name], "seconds": statistics.median(one.seconds)} for one in runs}
    notes = [
        f"A step of MiniLM on {config.sequences} x {config.length} tokens. Operations and bytes of ours are the "
        "compiler's, of every operation after fusion; of PEFT's those of all operations that PyTorch dispatches, with "
        "the bytes of their inputs and outputs. Many of these bytes are in a cache when they are read, so that a point "
        f"can lie above the slope. Limits: a product of two {config.side} x {config.side} matrices in float32, and a "
        f"pass over {config.values * 4 / 2**20:.0f} MiB, each the best of five.",
        *(f"{name}: absent, {reason}." for name, reason in absent.items()),
    ]
    return {"limits": limits, "steps": found, "notes": notes, "packages": ["torch", "peft", "transformers"]}


def _most_flops(side: int) -> float:
    """Operations a second of a large product."""
    multiply, x = jax.jit(lambda x: x @ x), jnp.full((side, side), 1.0 / side)
    return 2 * side**3 / fastest(lambda: multiply(x), 5)


def _most_bytes(values: int) -> float:
    """Bytes a second, read and written, of a pass over an array too large for any cache."""
    add, x = jax.jit(lambda x: x + 1.0), jnp.zeros(values)
    return 8 * values / fastest(lambda: add(x), 5)


def _counted(run: Any) -> dict[str, float]:
    """Operations and bytes of a step."""
    if isinstance(run, JaxRun):
        analysis = run.compiled.cost_analysis()
        assert analysis is not None
        return {"flops": float(analysis["flops"]), "bytes": float(analysis["bytes accessed"])}
    from torch.utils.flop_counter import FlopCounterMode

    counter, flops = _byte_counter(), FlopCounterMode(display=False)
    with flops, counter:
        run.step()
    return {"flops": float(flops.get_total_flops()), "bytes": float(counter.total)}


def _byte_counter() -> Any:
    """A mode of PyTorch that adds up the bytes of what operations read and write; views move none."""
    import torch
    from torch.utils import _pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            aliases = [r.alias_info for r in func._schema.returns]
            if not any(a is not None and not a.is_write for a in aliases):
                tensors = _pytree.tree_leaves((args, kwargs, out))
                self.total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
            return out

    return Counter()


def tables(results: Mapping[str, Any]) -> Sequence[tuple[str, Rows]]:
    """The machine's limits, and how near each step comes to them."""
    limits = results["limits"]
    first = [["limit", "a second"], ["operations", f"{limits['flops'] / 1e9:.0f} GFLOP"]]
    first.append(["bytes", f"{limits['bytes'] / 1e9:.1f} GB"])
    rows = [["step", "GFLOP", "MB", "operations a byte", "ms", "GFLOP a second", "of a large product's"]]
    for name, one in results["steps"].items():
        rate = one["flops"] / one["seconds"]
        cells = [f"{one['flops'] / 1e9:.1f}", f"{one['bytes'] / 1e6:.0f}", f"{one['flops'] / one['bytes']:.1f}"]
        rows.append([name, *cells, f"{1e3 * one['seconds']:.0f}", f"{rate / 1e9:.1f}", f"{rate / limits['flops']:.2f}"])
    return [("limits of the machine", first), ("steps of MiniLM", rows)]


def charts(results: Mapping[str, Any]) -> Sequence[Roofline]:
    """Operations a second against operations a byte."""
    points: dict[str, dict[str, tuple[float, float]]] = {"subspace_jax": {}, "PEFT": {}}
    for name, one in results["steps"].items():
        method, _, theirs = name.partition(", ")
        place = (one["flops"] / one["bytes"], one["flops"] / one["seconds"] / 1e9)
        points["PEFT" if theirs else "subspace_jax"][method] = place
    limits = {name: value / 1e9 for name, value in results["limits"].items()}
    points = {name: series for name, series in points.items() if series}
    return [Roofline("a step of MiniLM", points, limits["flops"], limits["bytes"])]


BENCHMARK = Benchmark(
    name="roofline",
    claim="Operations and bytes of steps here and in PyTorch PEFT, beside the limits of the machine.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
