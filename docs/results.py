"""Tables of recorded results, with the command that makes each and where it ran."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import benchmarks
from experiments import league, runner
from experiments.runner import human_bytes, markdown_table, read_json
from experiments.tasks.league import overview

ROOT = Path(__file__).parents[1]
# The league's task that is long enough to choose by.
REVIEWS = "text"


def experiment_table(name: str) -> str:
    """Returns the table of an experiment's recorded result, with its command and circumstances."""
    path = ROOT / "experiments" / "results" / f"{name}.json"
    if not path.exists():
        return f"No result is recorded yet; `python -m experiments run {name}` makes one."
    result, experiment = read_json(path), runner.find(name)
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


def step_table() -> str:
    """Returns operations and time of a step relative to full fine-tuning, from the recorded CPU result."""
    path = ROOT / "benchmarks" / "results" / "lora_step-cpu.json"
    if not path.exists():
        return "No result is recorded yet; `python -m benchmarks run lora_step` makes one."
    result = read_json(path)
    layouts = result["order"]["layouts"]
    timed = [x for x in layouts if any("seconds" in v["ratios"] for v in result["layouts"][x].values())]
    rows = [["variant", *(f"operations, {x}" for x in layouts), *(f"time, {x}" for x in timed), "optimizer state"]]
    for name in result["order"]["variants"]:
        cells = [result["layouts"][x].get(name, {}) for x in layouts]
        state = next((human_bytes(c["state_bytes"]) for c in cells if c), "")
        row = [name, *(_ratio(c, "step_flops") for c in cells)]
        rows.append([*row, *(_ratio(result["layouts"][x].get(name, {}), "seconds") for x in timed), state])
    where = result["environment"]
    note = (
        "A step of each relative to full fine-tuning: rank 8 on all kernels of a transformer of 4 layers of width 512, "
        "512 tokens. Operations are counted by the compiler, which counts the body of a scan once. "
        f"`python -m benchmarks run lora_step`; {where['cores']} cores, jax {where['packages']['jax']}."
    )
    return f"{markdown_table(rows)}\n\n{note}"


def _ratio(measured: dict[str, Any], name: str) -> str:
    value = measured.get("ratios", {}).get(name)
    return "-" if value is None else f"{value:.3f}" if name == "step_flops" else f"{value:.2f}"


def benchmark_table(name: str) -> str:
    """Returns the tables of a benchmark's recorded CPU result, with its notes, command and circumstances."""
    path = ROOT / "benchmarks" / "results" / f"{name}-cpu.json"
    if not path.exists():
        return f"No result is recorded yet; `python -m benchmarks run {name}` makes one."
    result, benchmark = read_json(path), runner.entry(benchmarks, name)
    found = benchmark.tables(result)
    # One table speaks for itself on its page; of several a reader must know which is which.
    tables = [
        f"*{title}*\n\n{markdown_table(rows)}" if len(found) > 1 else markdown_table(rows) for title, rows in found
    ]
    where = result["environment"]
    note = f"`python -m benchmarks run {name}`; {where['cores']} cores, jax {where['packages']['jax']}."
    return "\n\n".join([*tables, *result.get("notes", ()), note])


def league_table(methods: int | None = None) -> str:
    """Returns the recorded league with a line per method: accuracy on every task, and what it costs.

    Args:
      methods: how many of the best on film reviews to show; all, with the table of every task, if None.
    """
    if methods is not None:
        return markdown_table(overview(_league(), (REVIEWS,))[: 1 + methods])
    record = _league()
    return f"{markdown_table(overview(record, record['config']['tasks']))}\n\n{experiment_table('league')}"


def figures_of_the_league() -> tuple[list[str], dict[str, list[str]]]:
    """Returns the head of the table of film reviews without the method, and for each method in it its cells."""
    head, *lines = overview(_league(), (REVIEWS,))
    return list(head[1:]), {str(name): [str(cell) for cell in cells] for name, *cells in lines}


def _league() -> Any:
    return read_json(league.RECORD)
