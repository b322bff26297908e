"""Every way of fine-tuning that the league compares, at about the number of trained values of LoRA of rank 4."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

import subspace_jax as sj
from experiments.tasks.league._budget import RANK, Budget
from experiments.tasks.league._job import Job
from subspace_jax.methods.low_rank.block_lora import block_lora
from subspace_jax.methods.low_rank.comp_lora import comp_lora
from subspace_jax.methods.low_rank.orthogonal_adaptation import orthogonal_adaptation
from subspace_jax.methods.low_rank.pego import pego

Rules = Mapping[Any, Any]
MakeRules = Callable[[Job, Budget], Rules]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of fine-tuning.

    Attributes:
      rules: makes the rules of a task, the head's left out.
      rate: peak learning rate at which the search for the best begins.
      needs: statistics of the training data that the method starts from.
      rules_of: makes the rules of what was gathered, where the method chooses by it; `rules` is not used then.
      optimizer: makes the method's own optimizer of a schedule, the number of steps and the adapted tree; AdamW without
        decay if None.
    """

    rules: MakeRules
    rate: float
    needs: str | None = None
    rules_of: Callable[[Any, Any, Budget], Rules] | None = None
    optimizer: Callable[[optax.Schedule, int, Any], optax.GradientTransformation] | None = None


def _kernels(make: Callable[[Budget], sj.Method]) -> MakeRules:
    return lambda job, budget: {job.kernels: make(budget)}


def _everything(job: Job, budget: Budget) -> Rules:
    del job, budget
    return {"**": sj.full()}


def _all_kernels(job: Job, budget: Budget) -> Rules:
    del budget
    return {job.kernels: sj.full()}


def _nothing(job: Job, budget: Budget) -> Rules:
    del job, budget
    return {}


def _loca(schedule: optax.Schedule, steps: int, adapted: Any) -> optax.GradientTransformation:
    del adapted
    # A location moves about a cell a step; it rests after a fifth of the steps, which a turn's length requires here.
    return sj.methods.loca.alternating(
        optax.adamw(schedule, weight_decay=0.0),
        optax.adam(1e-3),
        cutoff_step=max(1, steps // 5),
        coefficient_steps=3,
        location_steps=3,
    )


def _spt(stats: Any, roles: Any, budget: Budget) -> Rules:
    found = sj.methods.spt.allocate(stats, budget.values, roles=roles, rank=RANK, most=10**9)
    return {found.paths: sj.methods.spt.spt(found)}


def _composable(stats: Any, roles: Any, budget: Budget) -> Rules:
    del roles
    # The gradients of a few batches stand for the changes of full fine-tuning, which would be another run.
    sft = sj.methods.composable_sft
    scores = {path: abs(np.asarray(one.gradient)) for path, one in stats.items()}
    found = sft.Selection(sj.weights.largest_of_all(scores, budget.values))
    return {found.paths: sft.composable_sft(found)}


def _s2ft(job: Job, budget: Budget) -> Rules:
    """One head of every attention, and as many channels of every feed-forward block as the budget has left."""
    downs = [sides for sides in budget.sides.values() if sides[0] > sides[1] == budget.width]
    hidden = downs[0][0]
    left = budget.values / len(downs) - budget.width**2 / job.heads
    channels = max(1, round(left / budget.width))
    return {
        job.outputs: sj.s2ft(1 / job.heads, heads=job.heads),
        job.downs: sj.s2ft(channels / hidden),
    }


def _svfit(job: Job, budget: Budget) -> Rules:
    """As many directions as a kernel has; kernels of keys and values are narrower where heads share them."""
    del job
    ranks = {path: min(sides) for path, sides in budget.sides.items()}
    return {tuple(p for p, r in ranks.items() if r == rank): sj.svfit(rank) for rank in dict.fromkeys(ranks.values())}


def _square_root(budget: Budget) -> int:
    return min(budget.width, round(budget.each**0.5))


ARMS: dict[str, Arm] = {
    "head only": Arm(_nothing, 3e-2),
    "full": Arm(_everything, 1e-4),
    "lora": Arm(_kernels(lambda b: sj.lora(RANK)), 3e-3),
    "dora": Arm(_kernels(lambda b: sj.dora(sj.lora(RANK))), 3e-3),
    "qlora": Arm(_kernels(lambda b: sj.qlora(RANK)), 3e-3),
    "pissa": Arm(_kernels(lambda b: sj.pissa(RANK)), 1e-3),
    "corda": Arm(_kernels(lambda b: sj.corda(RANK)), 1e-3, needs="gram"),
    "lora_sb": Arm(_kernels(lambda b: sj.lora_sb(_square_root(b), learning_rate=1e-3)), 1e-3, needs="gradient"),
    "lora_xs": Arm(_kernels(lambda b: sj.methods.lora_sb.lora_xs(_square_root(b))), 3e-3),
    "lora_pro": Arm(
        _kernels(lambda b: sj.lora(RANK)),
        1e-1,
        optimizer=lambda schedule, steps, adapted: sj.lora_pro(schedule, adapted=adapted),
    ),
    "matryoshka": Arm(_kernels(lambda b: sj.matryoshka(sj.lora(RANK))), 1e-3),
    "orthogonal_adaptation": Arm(_kernels(lambda b: orthogonal_adaptation(2 * RANK, concept=0)), 1e-2),
    "comp_lora": Arm(_kernels(lambda b: comp_lora(RANK, alpha=2.0)), 1e-2),
    "block_lora": Arm(_kernels(lambda b: block_lora(6, alpha=6**0.5)), 3e-3),
    "pego": Arm(_kernels(lambda b: pego(1, modules=RANK)), 1e-2),
    "flora": Arm(_kernels(lambda b: sj.flora(RANK)), 1e-2),
    "randlora": Arm(_kernels(lambda b: sj.randlora(b.width // 12)), 3e-3),
    "oft": Arm(_kernels(lambda b: sj.oft(16)), 3e-3),
    "soka": Arm(_kernels(lambda b: sj.soka(RANK)), 3e-3),
    "loca": Arm(_kernels(lambda b: sj.loca(b.each)), 3e-2, optimizer=_loca),
    "svfit": Arm(_svfit, 1e-1),
    "loldu": Arm(_kernels(lambda b: sj.loldu()), 1e-3),
    "lift": Arm(
        _kernels(lambda b: sj.lift(RANK, filter_rank=32)),
        3e-3,
        optimizer=lambda schedule, steps, adapted: sj.methods.lift.lift_adam(schedule),
    ),
    "s2ft": Arm(_s2ft, 1e-2),
    # SaRA's entries alone: its penalty and second selection are those of an optimizer that knows the tree.
    "sara": Arm(_kernels(lambda b: sj.methods.sara.sara(b.threshold())), 1e-3),
    "spt": Arm(_nothing, 3e-3, needs="squared_gradient", rules_of=_spt),
    "snell": Arm(_kernels(lambda b: sj.methods.snell.snell(RANK, sparsity=0.9)), 1e-2),
    "snella": Arm(_kernels(lambda b: sj.methods.snella.snella(RANK, sparsity=0.9)), 1e-2),
    "composable_sft": Arm(_nothing, 1e-3, needs="gradient", rules_of=_composable),
    "ssf": Arm(lambda job, budget: {job.scope: sj.ssf()}, 3e-3),
    # Optimizers that train all kernels, in 4 directions of each, as LoRA has. Those for pretraining (ROOT, ARO) are
    # compared by their own experiments.
    "galore": Arm(
        _all_kernels, 1e-3, optimizer=lambda schedule, steps, adapted: sj.galore(schedule, RANK, scale=1.0, every=50)
    ),
    "dct_adam": Arm(_all_kernels, 1e-3, optimizer=lambda schedule, steps, adapted: sj.dct_adam(schedule, RANK)),
    "trion": Arm(_all_kernels, 1e-2, optimizer=lambda schedule, steps, adapted: sj.trion(schedule, RANK)),
}
