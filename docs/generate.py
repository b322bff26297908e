"""Writes the generated parts of README.md and docs/ from the catalogue and results: `python -m docs.generate`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import subspace_jax as sj
from benchmarks._benchmark import find
from experiments import _registry
from experiments._results import human_bytes, markdown_table, read_json

ROOT = Path(__file__).parents[1]


def methods() -> str:
    """Returns the table of published methods."""
    rows = [["method", "functions", "source", "experiment"]]
    for source in sj.catalogue():
        functions = ", ".join(f"`sj.{name}`" for name in source.public)
        rows.append(
            [source.name, functions, f"{source.authors}: {source.title}, {source.year}", f"`{source.experiment}`"]
        )
    return markdown_table(rows)


def experiment_table(name: str) -> str:
    """Returns the table of an experiment's recorded result, with its command and circumstances."""
    path = ROOT / "experiments" / "results" / f"{name}.json"
    if not path.exists():
        return f"No result is recorded yet; `python -m experiments run {name}` makes one."
    result, experiment = read_json(path), _registry.find(name)
    defaults = {k: _listed(v) for k, v in dataclasses.asdict(experiment.config()).items()}
    other = {k: v for k, v in result["config"].items() if k in defaults and v != defaults[k]}
    settings = "".join(f" {k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in other.items())
    command = f"python -m experiments run {name}" + (f" --set{settings}" if settings else "")
    where = result["environment"]
    note = (
        f"`{command}`, mean ± standard deviation over {len(result['config']['seeds'])} seeds; {where['cores']} cores, "
        f"jax {where['packages']['jax']}."
    )
    return f"{markdown_table(experiment.rows(result))}\n\n{note}"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def experiments_table() -> str:
    """Returns every experiment with its claim and its command."""
    names = [name for name in _registry.names() if name not in ("quickstart", "adapters")]
    rows = [["experiment", "what it shows"], *([f"`{name}`", _registry.find(name).claim] for name in names)]
    return markdown_table(rows)


def step_table() -> str:
    """Returns operations and time of a step relative to full fine-tuning, from the recorded CPU result."""
    path = ROOT / "benchmarks" / "results" / "lora_step-cpu.json"
    if not path.exists():
        return "No result is recorded yet; `python -m benchmarks run lora_step` makes one."
    result = read_json(path)
    layouts = result["order"]["layouts"]
    timed = [x for x in layouts if any("seconds" in v["ratios"] for v in result["layouts"][x].values())]
    rows = [["variant", *(f"operations, {x}" for x in layouts), *(f"time, {x}" for x in timed), "optimiser state"]]
    for name in result["order"]["variants"]:
        cells = [result["layouts"][x].get(name, {}) for x in layouts]
        state = next((human_bytes(c["state_bytes"]) for c in cells if c), "")
        row = [name, *(_ratio(c, "step_flops") for c in cells)]
        rows.append([*row, *(_ratio(result["layouts"][x].get(name, {}), "seconds") for x in timed), state])
    where = result["environment"]
    note = (
        "A step of each relative to full fine-tuning: rank 8 on all kernels of a transformer of 4 layers of width 512, "
        "512 tokens. Operations are counted by the compiler, which counts the body of a scan once. "
        f"`python -m benchmarks run lora_step`; {where['cores']} cores, jax {where['packages']['jax']}; "
        "[all figures](benchmarks/results/README.md), [findings](benchmarks/NOTES.md)."
    )
    return f"{markdown_table(rows)}\n\n{note}"


def benchmark_table(name: str) -> str:
    """Returns the tables of a benchmark's recorded CPU result, with its notes, command and circumstances."""
    path = ROOT / "benchmarks" / "results" / f"{name}-cpu.json"
    if not path.exists():
        return f"No result is recorded yet; `python -m benchmarks run {name}` makes one."
    result, benchmark = read_json(path), find(name)
    tables = "\n\n".join(markdown_table(rows) for _, rows in benchmark.tables(result))
    where = result["environment"]
    note = f"`python -m benchmarks run {name}`; {where['cores']} cores, jax {where['packages']['jax']}."
    return "\n\n".join([tables, *result.get("notes", ()), note])


def _ratio(measured: dict[str, Any], name: str) -> str:
    value = measured.get("ratios", {}).get(name)
    return "-" if value is None else f"{value:.3f}" if name == "step_flops" else f"{value:.2f}"


PARTS: dict[str, Callable[[], str]] = {
    "methods": methods,
    "experiments": experiments_table,
    "adapters": lambda: experiment_table("adapters"),
    "quickstart": lambda: experiment_table("quickstart"),
    "lora_step": step_table,
    "optimizers": lambda: benchmark_table("optimizers"),
    "projected_step": lambda: benchmark_table("projected_step"),
    "lambda_orthogonality": lambda: experiment_table("lambda_orthogonality"),
    "continual_text": lambda: experiment_table("continual_text"),
    "continual_vision": lambda: experiment_table("continual_vision"),
    "gcr_fashion": lambda: experiment_table("gcr_fashion"),
}

PAGES = ("README.md", "docs/continual-learning.md")


def fill(text: str) -> str:
    """Returns a page with every generated part made anew.

    Args:
      text: a page with parts between `<!-- generated: NAME -->` and `<!-- end -->`.
    """

    def part(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- generated: {name} -->\n{PARTS[name]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", part, text, flags=re.DOTALL)


def main() -> None:
    """Writes every page anew."""
    for name in PAGES:
        page = ROOT / name
        page.write_text(fill(page.read_text()))


if __name__ == "__main__":
    main()
