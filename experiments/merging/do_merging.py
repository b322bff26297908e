"""DO-Merging on LoRA experts of unequal size: magnitudes and directions apart, and factors made orthogonal.

Four LoRAs of one network read shifted digits in a slot each (`experiments/tasks/slots.py`), trained at learning rates
from 3e-4 to 1.5e-2, so their updates differ in size several times. Every merger has one strength, the best of nine on
validation digits by the mean over seeds; the test digits are read once.

    python -m experiments run do_merging

Measured over three seeds; updates have norms of about 4, 9, 20 and 45. The claim does not show here: at the best
strengths task arithmetic reads 88.6 ± 1.4 % of the shifted digits, decoupled by output 78.7 ± 3.4 %, by matrix 78.2 ±
3.5 %, by input 66.6 ± 3.8 % (the random starts of LoRA fill inputs that no task uses), the full method 75.3 ± 4.7 %.
The slots share no inputs, so large updates drown nobody, and at equal lengths the experts that need large ones lose.
Orthogonalizing alone is within the spread, 87.6 ± 2.8 %, with the worst slot at 89 against 86 % of its expert; it
brings the overlap of factors down by more than 2000 times. At weak strengths the two are even: where both read 77 %
of the shifted digits, both read 86 % of the plain ones, and at 70 % decoupling keeps 2 points more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import subspace_jax as sj
from experiments.merging.mergers import best_of
from experiments.runner import Context, Experiment, with_spread
from experiments.tasks import slots
from subspace_jax.merging import task_arithmetic
from subspace_jax.methods.merging.do_merging import do_merging, orthogonalize, pair_loss


@dataclasses.dataclass(frozen=True)
class DoMergingConfig:
    """Settings of the comparison.

    Attributes:
      rank: of LoRA, at a scale of 2.
      steps: of Adam.
      rates: learning rates, one an expert.
      weights: of task arithmetic; those of the others are four times as large.
      seeds: one base and four experts each.
    """

    rank: int = 8
    steps: int = 600
    rates: tuple[float, ...] = (3e-4, 1e-3, 4e-3, 1.5e-2)
    weights: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.1, 1.5)
    seeds: tuple[int, ...] = (0, 1, 2)


def run(config: DoMergingConfig, context: Context) -> dict[str, Any]:
    """Trains the experts of every seed and merges them by every method and strength."""
    runs, sizes = [], []
    for seed in context.track(config.seeds, "DO-Merging"):
        base = slots.base_network(seed)
        rules = {"first/kernel": sj.lora(config.rank, alpha=2 * config.rank)}
        experts = slots.experts(base, rules, seed, config.steps, config.rates)
        apart = orthogonalize(experts, base)
        norms = [float(jnp.linalg.norm(sj.merge(e)["first"]["kernel"] - base["first"]["kernel"])) for e in experts]
        own = [slots.accuracies(sj.merge(e), "test", shifted=True)[i] for i, e in enumerate(experts)]
        sizes.append({"seed": seed, "norms": norms, "experts": own, "losses": [_pairs(experts), _pairs(apart)]})
        for weight in config.weights:
            arms = {
                "task arithmetic": task_arithmetic(experts, base, weights=weight),
                "orthogonalized, task arithmetic": task_arithmetic(apart, base, weights=weight),
                "DO-Merging": do_merging(experts, base, scale=4 * weight),
            }
            for granularity in ("output", "matrix", "input"):
                arms[f"decoupled by {granularity}"] = do_merging(
                    experts, base, scale=4 * weight, steps=0, granularity=granularity
                )
            for name, merged in arms.items():
                runs.append({"kind": "lora", "method": name, "seed": seed, "strength": weight} | _scores(merged, own))
    return {"runs": runs, "experts": sizes}


def _pairs(experts: Sequence[Any]) -> float:
    """How much the factors of experts overlap, at the length that the first stage gives them."""
    total = 0.0
    for field in "ab":
        factors = [getattr(e["first"]["kernel"], field) for e in experts]
        factors = jnp.stack([f if field == "a" else f.T for f in factors])
        rank = factors.shape[-1]
        norms = jnp.linalg.norm(factors, axis=(-2, -1), keepdims=True)
        total += float(pair_loss(factors * jnp.sqrt(rank) / norms))
    return total


def _scores(tree: Any, own: Sequence[float]) -> dict[str, Any]:
    params = sj.merge(tree)
    test = slots.accuracies(params, "test", shifted=True)
    return {
        "validation": float(np.mean(slots.accuracies(params, "validation", shifted=True))),
        "shifted": float(np.mean(test)),
        "worst": float(min(t / o for t, o in zip(test, own, strict=True))),
        "plain": float(np.mean(slots.accuracies(params, "test", shifted=False))),
    }


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns every merger at its best strength."""
    table = [["merger", "strength / 4", "shifted (%)", "worst slot, normalized (%)", "plain (%)"]]
    for method in dict.fromkeys(r["method"] for r in results["runs"]):
        best, edge, found = best_of(results, "lora", method)
        figures = (with_spread([r[key] for r in found]) for key in ("shifted", "worst", "plain"))
        table.append([method, f"{best:g}" + (" (edge)" if edge else ""), *figures])
    return table


EXPERIMENT = Experiment(
    name="do_merging",
    claim="Magnitudes and directions averaged apart: against task arithmetic, where experts differ in size.",
    config=DoMergingConfig,
    run=run,
    rows=rows,
)
