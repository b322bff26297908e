"""All mergers on the same experts: four of one network, as LoRA, as OFT and fine-tuned whole.

Every expert reads shifted digits in one of four slots (see `experiments/tasks/slots.py`); a merged network is to read
them in all four. Each merger has one strength, chosen on validation digits from the same nine multiples of its usual
value by the mean over seeds; the test digits are read once. Normalized accuracy is that over the expert's own, averaged
over slots. Beside it stands the accuracy on plain digits, which the base was trained for.

    python -m experiments run mergers

SLERP takes two models, so it is left out; the average is task arithmetic at 1/4. What the slots cannot show: they
share no inputs, so RegMean, which knows the inputs of every expert, is all but exact by construction, and the
conflict-aware OrthoMerge finds no conflict and is TIES.

Measured over three seeds: RegMean keeps 99.7 to 100 % of the experts, Fisher and TIES 97.8 to 100 %, task arithmetic
94 to 99 %, Iso-C 75 to 91 %, for every kind. Each pays with the plain digits, of which at these strengths half to two
thirds are still read, of 97.9 % by the base. OrthoMerge on OFT, which has no strength, keeps 89 % of the experts and
85 % of the plain digits; of LoRA after taking rotations out 91 and 83 %, the best of both kinds on the plain ones.
DO-Merging and OrthoMerge with task arithmetic were still rising at the largest strength.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj
from experiments.runner import Context, Experiment, human_bytes, with_spread
from experiments.tasks import slots
from experiments.tasks.merger_arms import arms, origin
from subspace_jax import merging


@dataclasses.dataclass(frozen=True)
class MergersConfig:
    """Settings of the comparison.

    Attributes:
      rank: of LoRA.
      block_size: of OFT.
      kinds: of experts.
      steps: of Adam, for each kind.
      rates: learning rates, likewise.
      multiples: of a merger's usual strength; the best on validation digits counts.
      seeds: one base and four experts of every kind each.
    """

    rank: int = 8
    block_size: int = 64
    kinds: tuple[str, ...] = ("lora", "oft", "full")
    steps: tuple[int, ...] = (600, 200, 300)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-3)
    multiples: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    seeds: tuple[int, ...] = (0, 1, 2)


def rules_of(kind: str, config: MergersConfig) -> Any:
    """What is adapted: the first kernel, or everything."""
    methods = {"lora": sj.lora(config.rank, alpha=2 * config.rank), "oft": sj.oft(config.block_size)}
    return {"**": sj.full()} if kind == "full" else {"first/kernel": methods[kind]}


def _at_strengths(
    merger: Callable[..., Any], experts: Any, base: Any, multiples: Sequence[float]
) -> tuple[list[Any], float, int]:
    """What a merger makes at every multiple of its usual strength, its seconds, and the bytes that it adds.

    The strength is a factor of the whole change, or of that from the merged rotation where there is one.
    """
    jax.block_until_ready(jax.tree.leaves(merger(experts, base)))
    began = time.perf_counter()
    merged = jax.block_until_ready(merger(experts, base))
    seconds = time.perf_counter() - began
    start = origin(merger, experts, base) if len(multiples) > 1 else base
    plain = sj.merge(merged)
    trees = [merging.task_arithmetic([plain], start, weights=m) for m in multiples]
    return trees, seconds, _added_bytes(merged, base)


def _statistics(trees: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Diagonal Fisher information and input Grams of every expert on its own training digits."""
    fishers, grams = [], []
    for slot, tree in enumerate(trees):
        plain = sj.merge(tree)
        x, y = slots.digits("train", True)
        x = slots.placed(x, slot)
        fishers.append(jax.tree.map(np.asarray, _fisher(plain, x[:256], y[:256])))
        grams.append({path: one.gram for path, one in sj.capture(slots.network, plain, [x]).items()})
    return [dict(sj.core.leaves_with_paths(f)) for f in fishers], grams


@jax.jit
def _fisher(params: Any, x: jax.Array, y: jax.Array) -> Any:
    one = jax.vmap(jax.grad(lambda p, x, y: slots.loss(p, x[None], y[None])), in_axes=(None, 0, 0))(params, x, y)
    return jax.tree.map(lambda g: jnp.mean(g * g, axis=0), one)


def run(config: MergersConfig, context: Context) -> dict[str, Any]:
    """Trains all experts and merges them by all mergers."""
    runs, singles = [], []
    budgets = zip(config.kinds, config.steps, config.rates, strict=True)
    jobs = [(*budget, seed) for budget in budgets for seed in config.seeds]
    for kind, steps, rate, seed in context.track(jobs, "mergers"):
        base = slots.base_network(seed)
        trees = slots.experts(base, rules_of(kind, config), seed, steps, (rate,) * 4)
        own = [slots.accuracies(tree, "test", shifted=True)[i] for i, tree in enumerate(trees)]
        singles.append({"kind": kind, "seed": seed, "experts": own, "base": _scores(base, own)})
        if kind == "full":  # ordinary trees, as a checkpoint would hold
            trees = [sj.merge(tree) for tree in trees]
        for name, (usual, merger) in arms(kind, *_statistics(trees)).items():
            multiples = config.multiples if usual is not None else (1.0,)
            merged, seconds, added = _at_strengths(merger, trees, base, multiples)
            for multiple, tree in zip(multiples, merged, strict=True):
                found = {"kind": kind, "method": name, "seed": seed, "strength": (usual or 1.0) * multiple}
                runs.append(found | _scores(tree, own) | {"seconds": seconds, "bytes": added})
    return {"runs": runs, "singles": singles}


def _scores(params: Any, own: Sequence[float]) -> dict[str, Any]:
    params = sj.merge(params)
    test = slots.accuracies(params, "test", shifted=True)
    return {
        "validation": float(np.mean(slots.accuracies(params, "validation", shifted=True))),
        "tasks": [round(t, 4) for t in test],
        "accuracy": float(np.mean(test)),
        "normalized": float(np.mean([t / o for t, o in zip(test, own, strict=True)])),
        "plain": float(np.mean(slots.accuracies(params, "test", shifted=False))),
    }


def _added_bytes(merged: Any, base: Any) -> int:
    """Bytes of the merged tree that are not the base's arrays."""
    shared = {id(leaf) for leaf in jax.tree.leaves(base)}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(merged) if id(leaf) not in shared)


def best_of(results: Mapping[str, Any], kind: str, method: str) -> tuple[float, bool, list[Mapping[str, Any]]]:
    """Returns the best strength on validation digits, whether it is at an edge, and the runs at it."""
    found = [r for r in results["runs"] if r["kind"] == kind and r["method"] == method]
    strengths = sorted({r["strength"] for r in found})
    score = {s: np.mean([r["validation"] for r in found if r["strength"] == s]) for s in strengths}
    best = max(strengths, key=lambda s: score[s])
    edge = len(strengths) > 1 and best in (strengths[0], strengths[-1])
    return best, edge, [r for r in found if r["strength"] == best]


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns every merger at its best strength, by kind of experts."""
    header = ["experts", "merger", "strength", "slots 1 to 4 (%)", "mean (%)", "normalized (%)", "plain digits (%)"]
    table = [[*header, "time (ms)", "added"]]
    for kind in dict.fromkeys(r["kind"] for r in results["runs"]):
        singles = [s for s in results["singles"] if s["kind"] == kind]
        start = [s["base"] for s in singles]
        own = [s["experts"] for s in singles]
        mean = with_spread([float(np.mean(one)) for one in own])
        table.append([kind, "each expert alone", "", _per_task(own), mean, *[""] * 4])
        table.append([kind, "the base", "", *_figures(start), "", ""])
        for method in dict.fromkeys(r["method"] for r in results["runs"] if r["kind"] == kind):
            best, edge, found = best_of(results, kind, method)
            seconds = 1000 * float(np.median([r["seconds"] for r in found]))
            strength = f"{best:g}" + (" (edge)" if edge else "") if method != "OrthoMerge" else ""
            size = human_bytes(found[0]["bytes"])
            table.append([kind, method, strength, *_figures(found), f"{seconds:.0f}", size])
    return table


def _per_task(values: Sequence[Sequence[float]]) -> str:
    return " ".join(f"{100 * v:.0f}" for v in np.mean(values, axis=0))


def _figures(found: Sequence[Mapping[str, Any]]) -> list[str]:
    tasks = _per_task([r["tasks"] for r in found])
    return [tasks, *(with_spread([r[key] for r in found]) for key in ("accuracy", "normalized", "plain"))]


EXPERIMENT = Experiment(
    name="mergers",
    claim="Four experts of one network become one; what each merger keeps of them, for LoRA, OFT and full experts.",
    config=MergersConfig,
    run=run,
    rows=rows,
)
