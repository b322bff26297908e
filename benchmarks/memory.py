"""The largest Llama that fine-tunes on one device of a given memory, compiled only.

What is counted is a training step. Making the adapters is not: decompositions and quantization go matrix by matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import subspace_jax as sj
from benchmarks._benchmark import Benchmark, Rows
from benchmarks._charts import Chart
from benchmarks._compile_program import KERNELS, Make, Setting
from experiments.runner import human_bytes
from subspace_jax.training import make_mesh

# Name, width, heads, width of the MLP, layers.
SHAPES: tuple[tuple[str, int, int, int, int], ...] = (
    ("0.35B", 1024, 16, 2816, 24),
    ("1B", 2048, 32, 5632, 22),
    ("3B", 3200, 32, 8640, 26),
    ("7B", 4096, 32, 11008, 32),
    ("13B", 5120, 40, 13824, 40),
    ("33B", 6656, 52, 17920, 60),
    ("65B", 8192, 64, 22016, 80),
)

GIBIBYTE = 2**30

# The CPU compiler multiplies in float32 and would convert all stacked matrices before the loop over layers, which no
# accelerator does. Machine code does not matter here, and is made after memory is laid out.
OPTIONS = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      vocabulary: rows of the embedding and columns of the head.
      sequences: sequences in a batch.
      length: tokens in a sequence.
      rank: of LoRA and QPiSSA, and the budget of LIFT as such a rank.
      optimizer_rank: of the low-rank optimizers.
      budgets: memory of the device, in GiB.
      methods: what is compiled.
      shapes: names of the widths to choose from, smallest first.
      compared: the one whose bytes are shown for every method.
    """

    vocabulary: int = 32000
    sequences: int = 1
    length: int = 1024
    rank: int = 16
    optimizer_rank: int = 128
    budgets: tuple[int, ...] = (8, 16, 24, 80)
    methods: tuple[str, ...] = ("full", "dct_adam", "lift", "lora", "qpissa")
    shapes: tuple[str, ...] = tuple(shape[0] for shape in SHAPES)
    compared: str = "1B"


def methods(config: Config) -> dict[str, tuple[dict[str, sj.Method], Make]]:
    """Returns the rules of every method, and a function from the frozen tree to the optimizer."""
    rank, optimizer_rank = config.rank, config.optimizer_rank

    def adam(_: Any) -> optax.GradientTransformation:
        return optax.adam(1e-4)

    def rated(transformation: optax.GradientTransformation) -> Make:
        return lambda _: optax.chain(transformation, optax.scale_by_learning_rate(1e-4))

    everything = {"**": sj.full()}
    return {
        "full": (everything, adam),
        "dct_adam": (everything, rated(sj.methods.dct_lowrank.scale_by_dct_adam(optimizer_rank, error_feedback=False))),
        "dct_adam, error feedback": (everything, rated(sj.methods.dct_lowrank.scale_by_dct_adam(optimizer_rank))),
        "galore": (everything, lambda _: sj.galore(1e-4, optimizer_rank)),
        "lift": (
            {KERNELS: sj.lift(rank, filter_rank=rank, svd="randomized")},
            lambda _: sj.methods.lift.lift_adam(1e-4),
        ),
        "lora": ({KERNELS: sj.lora(rank)}, adam),
        "qpissa": ({KERNELS: sj.qpissa(rank)}, adam),
        "snell": ({KERNELS: sj.methods.snell.snell(rank, sparsity=0.9, dropout=0.0, drop_path=0.0)}, adam),
        "snella": (
            {KERNELS: sj.methods.snella.snella(rank, sparsity=0.9, dropout=0.0, drop_path=0.0)},
            lambda frozen: sj.methods.snella.with_importance(adam(frozen)),
        ),
        "dense, masked": ({KERNELS: sj.full()}, lambda frozen: optax.chain(masked(), adam(frozen))),
    }


def masked() -> optax.GradientTransformation:
    """Lets the gradient through where a stored mask of every array says so, as sparse tuning with a mask does."""

    def init(params: Any) -> Any:
        return jax.tree.map(lambda v: jnp.zeros(v.shape, bool), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda g, mask: jnp.where(mask, g, 0), updates, state), state

    return optax.GradientTransformation(init, update)


class Compiler:
    """Compiles training steps on one device and remembers what they hold.

    Args:
      config: batch and ranks.
      console: hears of every compilation; None for silence.
    """

    def __init__(self, config: Config, console: Console | None = None) -> None:
        self.config, self.console = config, console
        self.measure = functools.cache(self._measure)
        self.mesh = make_mesh({"data": 1, "model": 1}, devices=jax.devices()[:1])
        self.setting = functools.cache(self._setting)

    def bytes(self, method: str, name: str, layers: int) -> int:
        """Returns the bytes of a step of one method on a model of a width by name and so many layers."""
        return self.measure(method, name, layers)["bytes"]

    def _setting(self, name: str, layers: int) -> Setting:
        """The model, which is the same for every method."""
        config = self.config
        _, width, heads, mlp_width, _ = shape(name)
        settings = {"vocabulary": config.vocabulary, "sequences": config.sequences, "length": config.length}
        settings |= {"width": width, "heads": heads, "mlp_width": mlp_width, "layers": layers, "remat": True}
        return Setting(settings, self.mesh)

    def _measure(self, method: str, name: str, layers: int) -> dict[str, int]:
        with jax.set_mesh(self.mesh):
            setting = self.setting(name, layers)
            lowered, sizes = setting.step(*methods(self.config)[method], setting.roles)
            memory: Any = lowered.compile(OPTIONS).memory_analysis()
        found = {
            "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(setting.params)),
            **sizes,
            "argument_bytes": memory.argument_size_in_bytes,
            # What the step returns reuses the donated buffers of the state that went in, but for a few scalars.
            "temporary_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        }
        found["bytes"] = found["argument_bytes"] + found["temporary_bytes"]
        if self.console is not None:
            self.console.print(f"  {method}, {name} with {layers} layers: {human_bytes(found['bytes'])}")
        return found


def shape(name: str) -> tuple[str, int, int, int, int]:
    """Returns the shape of a name.

    Raises:
      SystemExit: there is none.
    """
    for known in SHAPES:
        if known[0] == name:
            return known
    raise SystemExit(f"memory: shapes={name}; choose from {', '.join(known[0] for known in SHAPES)}.")


def deepest(held: Callable[[int], int], budget: int, layers: int) -> int:
    """Returns the largest number of layers that fits, 0 if none does.

    Layers are scanned, so that bytes are nearly affine in the depth: two depths tell where to look, and the place is
    proved by compiling there and one layer above.

    Args:
      held: bytes of a model of so many layers, increasing.
      budget: bytes that there are.
      layers: a depth to look from.
    """
    slope = (held(2 * layers) - held(layers)) / layers
    found = max(0, layers + math.floor((budget - held(layers)) / slope))
    while found and held(found) > budget:
        found -= 1
    while held(found + 1) <= budget:
        found += 1
    return found


def run(config: Config, console: Console) -> dict[str, Any]:
    """Finds the largest model of every method and budget, and the bytes of one model for every method."""
    unknown = [name for name in config.methods if name not in methods(config)]
    if unknown:
        raise SystemExit(f"memory: methods={','.join(unknown)}; choose from {', '.join(methods(config))}.")
    compiler = Compiler(config, console)
    found = [
        {"method": method, "budget": budget, **largest(compiler, method, config.shapes, budget * GIBIBYTE)}
        for method in config.methods
        for budget in config.budgets
    ]
    layers = shape(config.compared)[-1]
    compared = {method: compiler.measure(method, config.compared, layers) for method in config.methods}
    order = {"methods": list(config.methods), "budgets": list(config.budgets), "compared": config.compared}
    return {"largest": found, "compared": compared, "order": order, "notes": _notes(config)}


def largest(compiler: Compiler, method: str, names: Sequence[str], budget: int) -> dict[str, Any]:
    """Returns the widest model that fits with its own depth, as deep as fits.

    Args:
      compiler: counts bytes.
      method: how it is fine-tuned.
      names: of the shapes to choose from, smallest first; the first one may be shallower than it is.
      budget: bytes that there are.

    Returns:
      `width_of` and `layers`, and unless these are 0 what the step holds, and with one layer more.
    """
    chosen = names[0]
    for name in names:
        if compiler.bytes(method, name, shape(name)[-1]) > budget:
            break
        chosen = name
    layers = deepest(lambda n: compiler.bytes(method, chosen, n), budget, shape(chosen)[-1])
    found = {"width_of": chosen, "layers": layers}
    if layers:
        found |= compiler.measure(method, chosen, layers)
        found["one_more_bytes"] = compiler.bytes(method, chosen, layers + 1)
    return found


def _notes(config: Config) -> list[str]:
    return [
        f"A training step on {config.sequences} x {config.length} tokens, compiled for one device and not run; "
        "layers are scanned and recomputed in the backward pass, frozen weights are bfloat16 (NF4 for qpissa), what "
        "learns and its moments are float32. Bytes are arguments and temporaries as the compiler lays them out, "
        "without the runtime's own. Temporaries are those of the CPU compiler, which computes bfloat16 products in "
        "float32 and forms attention scores in full: an upper bound for accelerators. What it would do once and no "
        "accelerator does, convert all frozen matrices to float32 before the loop over layers, is turned off.",
        "Widths, heads and MLPs are those of well-known models; the largest is the widest of them that fits at its own "
        "depth, deepened until one more layer does not fit, which is compiled as well.",
        f"Rank {config.rank} on all kernels for lora, qpissa and, as a budget, lift; rank {config.optimizer_rank} for "
        "low-rank optimizers, which train everything. full is Adam.",
    ]


def tables(results: Mapping[str, Any]) -> Sequence[tuple[str, Rows]]:
    """Returns the largest model of every budget, its shape, and the bytes of one model."""
    order = results["order"]
    most = [["method", *(f"{budget} GiB" for budget in order["budgets"])]]
    for method in order["methods"]:
        cells = [_model(row) for row in results["largest"] if row["method"] == method]
        most.append([method, *cells])
    rows = [["method", "parameters", "all", "arguments", "frozen", "learned", "optimizer", "temporaries"]]
    for method in order["methods"]:
        held = results["compared"][method]
        keys = ("", "argument_", "frozen_", "trainable_", "optimizer_", "temporary_")
        sizes = [human_bytes(held[f"{key}bytes"]) for key in keys]
        rows.append([method, f"{held['parameters']:,}", *sizes])
    title = f"Bytes of a step of {order['compared']}"
    return [("Largest model, in billions of parameters: width x layers", most), (title, rows)]


def _model(row: Mapping[str, Any]) -> str:
    if not row["layers"]:
        return "-"
    return f"{row['parameters'] / 1e9:.2f}: {shape(row['width_of'])[1]} x {row['layers']}"


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """The largest models, and what one model needs."""
    found: dict[str, dict[str, float]] = {}
    for row in results["largest"]:
        if row["layers"]:
            found.setdefault(row["method"], {})[f"{row['budget']} GiB"] = row["parameters"] / 1e9
    keys = {"frozen": "frozen_", "learned": "trainable_", "optimizer": "optimizer_", "temporaries": "temporary_"}
    held = {
        method: {name: values[f"{key}bytes"] / GIBIBYTE for name, key in keys.items()}
        for method, values in results["compared"].items()
    }
    title = f"a step of {results['order']['compared']}"
    return [
        Chart("largest model", "billions of parameters", found, log=True),
        Chart(title, "GiB", held),
    ]


BENCHMARK = Benchmark(
    name="memory",
    claim="The largest model that each method fine-tunes in a given memory, by the compiler's count.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
