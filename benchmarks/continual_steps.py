"""Operations of a step of GPM's and OSF's learners on the text stream, from task to task, beside full fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import subspace_jax as sj
from benchmarks._benchmark import Benchmark, Rows
from benchmarks._learner_steps import GOAL, WAYS
from benchmarks._measure import cost
from experiments.continual.continual_text import ContinualTextConfig, load
from experiments.runner import read_json
from experiments.tasks.streams import StreamData

RECORDED = Path(__file__).parents[1] / "experiments" / "results" / "continual_text.json"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      batches: examples of a step, of 16 tokens each; the recorded streams have 8.
    """

    batches: tuple[int, ...] = (8, 64)


def run(config: Config, console: Console) -> dict[str, Any]:
    """Compiles every step; none runs."""
    stream = ContinualTextConfig()
    data = load(stream)
    tasks, adam = len(data.names), optax.adam(1e-3)
    apply = sj.with_adapters(data.own)
    heads = {"rules": {"heads/*": sj.full()}, "roles": data.roles}

    def loss(params: Any, batch: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, batch), batch["labels"]).mean()

    gpm_options = {"columns": stream.columns, **heads}
    makers: dict[str, Callable[..., sj.continual.Learner]] = {
        "GPM": lambda **way: sj.methods.gpm.learner(loss, data.kernels, adam, **gpm_options, **way),
        "OSF": lambda **way: sj.methods.osf.learner(loss, data.kernels, adam, tasks=tasks, **heads, **way),
    }
    plain = sj.continual.sequential_learner(loss, {"**": sj.full()}, adam)
    steps = []
    for size in config.batches:
        full = _flops(plain, data, 0, size)
        for name, make in makers.items():
            for way, options in WAYS.items():
                console.print(f"  {name}, {way}, {size} texts")
                # At the common width every task has the same step.
                numbers = range(tasks) if options["width"] == "bucketed" else [tasks - 1]
                found = [_flops(make(**options), data, task, size) / full for task in numbers]
                steps.append({"learner": f"{name}, {way}", "rows": size * stream.max_length, "ratios": found})
    note = (
        "Compiled operations, relative to full fine-tuning, in which biases, norms and all kernels of the two upper "
        "layers learn; GPM and OSF train the attention kernels alone. The memory of GPM grows evenly to what it was at "
        "the end of the recorded streams; OSF freezes by its schedule."
    )
    return {"steps": steps, "notes": [note]}


def _flops(learner: sj.continual.Learner, data: StreamData, task: int, size: int) -> float:
    """The operations of the compiled step of a task."""
    key = jax.random.key(0)
    state = learner.init(data.start(0), key)
    state = state._replace(task=jnp.asarray(task, jnp.int32))
    if learner.name == "gpm":
        kept = [run["kept"] for run in read_json(RECORDED)["runs"] if run["method"] == "gpm"]
        share = task / len(data.names)
        ranks = {path: int(share * np.mean([k[path] for k in kept])) for path in state.memory}
        state = state._replace(memory={path: _filled(m, ranks[path]) for path, m in state.memory.items()})
    state = learner.start_task(state, task, key)
    train = data.splits[0]["train"]
    batch = {name: jnp.asarray(values[:size]) for name, values in train.items()}
    batch["task"] = jnp.full(size, task, jnp.int32)
    return cost(learner.step, (state, batch, key), donate_argnums=0)[0].flops


def _filled(memory: Any, rank: int) -> Any:
    """A memory of so many directions, whichever."""
    size = memory.basis.shape[-2]
    basis = memory.basis.at[..., :rank].set(jnp.eye(size)[:, :rank])
    return memory._replace(basis=basis, rank=jnp.full_like(memory.rank, rank))


def tables(results: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """One table, a line for every learner and number of rows."""
    rows = [["learner", "rows of a step", "operations of a step / full, by task", "mean", f"all at most {GOAL}"]]
    for step in results["steps"]:
        ratios = [f"{ratio:.2f}" for ratio in step["ratios"]]
        within = "yes" if max(step["ratios"]) <= GOAL else "no"
        rows.append([step["learner"], str(step["rows"]), ", ".join(ratios), f"{np.mean(step['ratios']):.2f}", within])
    return [("steps of the text stream", rows)]


BENCHMARK = Benchmark(
    name="continual_steps",
    claim="GPM's and OSF's steps in the text stream beside full fine-tuning, by width and by what is projected.",
    config=Config,
    run=run,
    tables=tables,
)
