"""One training step of a transformer: full fine-tuning, this library, and other ways to LoRA, in one process."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from benchmarks._benchmark import Benchmark, Rows, number
from benchmarks._charts import Chart
from benchmarks._measure import (
    Cost,
    Runner,
    build_seconds,
    combined,
    forward_cost,
    interleaved,
    paired_ratio,
    step_cost,
)
from benchmarks._models import StepConfig
from benchmarks._variants import Variant, variants
from experiments.runner import human_bytes


@dataclasses.dataclass(frozen=True)
class Config(StepConfig):
    """Settings: those of `StepConfig`, and these; the defaults are the sizes that the README's figures are for.

    A model of the shape of a 3-billion-parameter language model in bfloat16, on a GPU of 80 GB:
    `--set width=2560 heads=20 mlp_width=10240 layers=32 vocabulary=32000 dtype=bfloat16 layouts=scan+remat
    sequences=2 length=1024 variants=full,lora`.

    Attributes:
      layouts: of the blocks.
      variants: names of the ways to fine-tune; all if empty.
      rounds: timed steps of each variant, interleaved; 0 compiles only and allocates nothing.
      compilations: number of times that tracing and compiling are timed.
    """

    layouts: tuple[str, ...] = ("unrolled", "remat", "scan", "scan+remat")
    variants: tuple[str, ...] = ()
    rounds: int = 10
    compilations: int = 3


def run(config: Config, console: Console) -> dict[str, Any]:
    """Measures all variants, layout by layout."""
    layouts, absent, order = {}, {}, {}
    for layout in config.layouts:
        console.print(f"[bold]{layout}[/bold]")
        layouts[layout], missing = _layout(config, layout, console)
        absent |= missing
        order |= dict.fromkeys(layouts[layout])
    order = {"layouts": list(layouts), "variants": list(order)}
    notes = _notes(layouts, absent)
    return {"layouts": layouts, "order": order, "absent": absent, "notes": notes, "packages": ["qwix"]}


def _layout(config: Config, layout: str, console: Console) -> tuple[dict[str, Any], dict[str, str]]:
    abstract = config.rounds == 0
    tokens = config.tokens(abstract=abstract)
    found = list(variants(config.model(layout), config.rank, tokens, abstract=abstract, only=config.variants))
    absent = dict(v for v in found if not isinstance(v, Variant))
    made = [v for v in found if isinstance(v, Variant)]
    measured = {variant.name: _sizes(variant) for variant in made}
    _compile(made, measured, tokens, config.compilations, console)
    if config.rounds:
        _time(made, measured, tokens, config.rounds, console)
    return measured, absent


def _sizes(variant: Variant) -> dict[str, Any]:
    state = jax.eval_shape(variant.optimizer().init, variant.learned)
    return {
        "baseline": variant.baseline,
        "note": variant.note,
        "trainable_values": variant.trainable_values,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "ratios": {},
    }


def _compile(made: Sequence[Variant], measured: dict[str, Any], tokens: Any, rounds: int, console: Console) -> None:
    """Compiles step and forward of all variants in turn, so that their times are comparable."""
    costs: dict[str, dict[str, list[Cost]]] = {v.name: {"step": [], "forward": []} for v in made}
    for i in range(rounds + 1):
        console.print(f"  compiling {len(made)} variants, round {i} of {rounds}")
        for variant in made:
            both = {"step": step_cost(variant, tokens)[0], "forward": forward_cost(variant, tokens)}
            if i > 0:  # the first traces in a process pay for what later ones find done
                for kind, one in both.items():
                    costs[variant.name][kind].append(one)
    for variant in made:
        for kind, found in costs[variant.name].items():
            values = measured[variant.name]
            values[kind] = combined(found)
            if variant.baseline in costs:
                reference = costs[variant.baseline][kind]
                values["ratios"][f"{kind}_flops"] = found[0].flops / reference[0].flops
                values["ratios"][f"{kind}_bytes"] = found[0].temporary_bytes / reference[0].temporary_bytes
                values["ratios"][f"{kind}_build"] = paired_ratio(build_seconds(found), build_seconds(reference))


def _time(made: Sequence[Variant], measured: dict[str, Any], tokens: Any, rounds: int, console: Console) -> None:
    console.print(f"  running {rounds} rounds of {len(made)} variants")
    runners = {variant.name: Runner(variant, tokens) for variant in made}
    interleaved(list(runners.values()), rounds)
    for name, runner in runners.items():
        reference = runners.get(measured[name]["baseline"])
        measured[name]["seconds"] = runner.seconds
        measured[name]["losses"] = [runner.losses[0], runner.losses[-1]]
        if reference is not None:
            measured[name]["ratios"]["seconds"] = paired_ratio(runner.seconds, reference.seconds)


def _notes(layouts: Mapping[str, Any], absent: Mapping[str, str]) -> list[str]:
    notes = [
        "FLOPs are those of the compiler's cost analysis; it counts the body of a scan once. Every ratio is to full "
        "fine-tuning of the same model, in Linen or in NNX. Temporaries include outputs, which serve as temporaries. "
        "Transposes include copies, both of the optimized program. Build is tracing, lowering and compiling. Time "
        "ratios are medians over rounds in which all variants ran one after the other.",
    ]
    told = {name: values["note"] for measured in layouts.values() for name, values in measured.items()}
    notes += [f"{name}: {note}." for name, note in told.items() if note]
    return notes + [f"{name}: absent, {reason}." for name, reason in absent.items()]


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """Two tables for each layout: what the compiler counts, and what the clock says."""
    found: list[tuple[str, Rows]] = []
    order = results["order"]
    for layout in order["layouts"]:
        measured = {n: results["layouts"][layout][n] for n in order["variants"] if n in results["layouts"][layout]}
        found.append((f"{layout}: counted by the compiler", _counted(measured)))
        found.append((f"{layout}: time", _clocked(measured)))
    return found


def _counted(measured: Mapping[str, Any]) -> Rows:
    rows = [["variant", "step GFLOP", "ratio", "forward ratio", "temporaries", "trainable", "optimizer", "transposes"]]
    for name, values in measured.items():
        step, ratios = values["step"], values["ratios"]
        rows.append(
            [
                name,
                f"{step['flops'] / 1e9:.2f}",
                number(ratios.get("step_flops"), 3),
                number(ratios.get("forward_flops"), 3),
                human_bytes(step["temporary_bytes"]),
                f"{values['trainable_values']:,}",
                human_bytes(values["state_bytes"]),
                str(step["transposes"] + step["copies"]),
            ]
        )
    return rows


def _clocked(measured: Mapping[str, Any]) -> Rows:
    rows = [["variant", "trace s", "compile s", "build ratio", "forward build ratio", "step ms", "time ratio"]]
    for name, values in measured.items():
        step, ratios, seconds = values["step"], values["ratios"], values.get("seconds")
        rows.append(
            [
                name,
                f"{step['lower_seconds']:.2f}",
                f"{step['compile_seconds']:.2f}",
                number(ratios.get("step_build"), 3),
                number(ratios.get("forward_build"), 3),
                "-" if not seconds else f"{1e3 * statistics.median(seconds):.1f}",
                number(ratios.get("seconds"), 3),
            ]
        )
    return rows


def charts(results: Mapping[str, Any]) -> list[Chart]:
    """Operations and time of every way, one chart for each layout."""
    found = []
    for layout in results["order"]["layouts"]:
        measured, bars = results["layouts"][layout], {}
        for name in (n for n in results["order"]["variants"] if n in measured):
            ratios = measured[name]["ratios"]
            kinds = {"operations": "step_flops", "step time": "seconds"}
            bars[name] = {title: ratios[key] for title, key in kinds.items() if key in ratios}
        found.append(Chart(layout, "relative to full fine-tuning", bars, reference=1.0))
    return found


BENCHMARK = Benchmark(
    name="lora_step",
    claim="What a LoRA step costs beside full fine-tuning, nnx.LoRA, materialized LoRA, late freezing and qwix.",
    config=Config,
    run=run,
    tables=tables,
    charts=charts,
)
