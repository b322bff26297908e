"""OrthoMerge on the digits in slots: OFT adapters on the manifold, and full fine-tunes after taking rotations out.

Four experts of one network read shifted digits in a slot each (`experiments/tasks/slots.py`). "Shifted" is the accuracy
of the merged network on all four, "plain" that on the digits the base was trained for.

    python -m experiments run orthomerge

Measured over three seeds. OFT (coordinates of length 1.1 to 1.2): the mean of coordinates reads 61.7 ± 1.1 % of the
shifted digits, at their mean length 67.8 ± 4.8 %, and every singular value stays. Task arithmetic reads as much at
about 0.35, where it keeps one point more of the plain digits, so on these two figures the manifold gains nothing;
task arithmetic changes singular values by 10 %. Full fine-tunes: with rotations taken out first, 0.2 of the residuals
read 82.2 ± 1.1 % where 0.2 of task arithmetic reads 64.5 ± 0.9 %, but 13 points fewer of the plain digits. Of all
strengths tried the residuals at 1.0 lead, by 89.3 ± 0.1 % to 86.8 ± 0.9 % of task arithmetic at 0.5; these strengths
were not chosen on other digits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj
from experiments.runner import Context, Experiment, with_spread
from experiments.tasks import slots
from subspace_jax.merging import task_arithmetic
from subspace_jax.methods.merging.orthomerge import orthomerge


@dataclasses.dataclass(frozen=True)
class OrthomergeConfig:
    """Settings of both parts.

    Attributes:
      oft_steps: of Adam for OFT, one block over all inputs of the first kernel.
      oft_rate: its learning rate; short training keeps rotations small enough to be averaged.
      full_steps: of Adam for full fine-tuning.
      full_rate: its learning rate.
      weights: of task arithmetic.
      seeds: one base and four experts of both kinds each.
    """

    oft_steps: int = 100
    oft_rate: float = 5e-4
    full_steps: int = 300
    full_rate: float = 1e-3
    weights: tuple[float, ...] = (0.2, 0.25, 0.3, 0.5, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)


def run(config: OrthomergeConfig, context: Context) -> dict[str, Any]:
    """Trains both kinds of experts and merges them."""
    runs: list[dict[str, Any]] = []
    for seed in context.track(config.seeds, "OrthoMerge"):
        base = slots.base_network(seed)
        rules = {"first/kernel": sj.oft(slots.SLOTS * slots.PIXELS)}
        oft = slots.experts(base, rules, seed, config.oft_steps, (config.oft_rate,) * 4)
        trees = slots.experts(base, {"**": sj.full()}, seed, config.full_steps, (config.full_rate,) * 4)
        full = [sj.merge(tree) for tree in trees]
        arms = {
            ("OFT", "mean of coordinates"): mean_of_coordinates(oft),
            ("OFT", "OrthoMerge"): orthomerge(oft, base),
            ("full", "OrthoMerge, residuals at 0.2"): orthomerge(full, base),
            ("full", "OrthoMerge, residuals at 1.0"): orthomerge(
                full, base, merger=functools.partial(task_arithmetic, weights=1.0)
            ),
        }
        for weight in config.weights:
            for kind, experts in (("OFT", oft), ("full", full)):
                arms[kind, f"task arithmetic at {weight:g}"] = task_arithmetic(experts, base, weights=weight)
        runs.append({"kind": "OFT", "method": "the base", "seed": seed} | _scores(base, base))
        for (kind, name), merged in arms.items():
            runs.append({"kind": kind, "method": name, "seed": seed} | _scores(merged, base))
        lengths = [float(np.sqrt(2) * jnp.linalg.norm(tree["first"]["kernel"].skew_entries)) for tree in oft]
        runs[-1]["lengths"] = lengths
    return {"runs": runs}


def mean_of_coordinates(experts: Sequence[Any]) -> Any:
    """The control: the mean of skew-symmetric coordinates, without correcting its length."""
    entries = [tree["first"]["kernel"].skew_entries for tree in experts]
    kernel = dataclasses.replace(experts[0]["first"]["kernel"], skew_entries=jnp.mean(jnp.stack(entries), axis=0))
    return experts[0] | {"first": experts[0]["first"] | {"kernel": kernel}}


def _scores(tree: Any, base: Any) -> dict[str, float]:
    params = jax.tree.map(jnp.asarray, sj.merge(tree))
    values = [np.linalg.svd(v["first"]["kernel"], compute_uv=False) for v in (params, base)]
    return {
        "shifted": float(np.mean(slots.accuracies(params, "test", shifted=True))),
        "plain": float(np.mean(slots.accuracies(params, "test", shifted=False))),
        "singular_value_change": float(np.abs(values[0] / values[1] - 1).max()),
    }


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns every merger's accuracies."""
    table = [["experts", "merger", "shifted (%)", "plain (%)", "largest change of a singular value"]]
    for kind, method in dict.fromkeys((r["kind"], r["method"]) for r in results["runs"]):
        found = [r for r in results["runs"] if (r["kind"], r["method"]) == (kind, method)]
        change = max(r["singular_value_change"] for r in found)
        figures = (with_spread([r[key] for r in found]) for key in ("shifted", "plain"))
        table.append([kind if method != "the base" else "", method, *figures, f"{change:.1g}"])
    return table


EXPERIMENT = Experiment(
    name="orthomerge",
    claim="OFT adapters merged at their mean length read more than their plain mean, at the base's singular values.",
    config=OrthomergeConfig,
    run=run,
    rows=rows,
)
