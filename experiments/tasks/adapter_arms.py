"""Every adapter of the catalogue for MiniLM, at about one number of trained values, with its learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

import subspace_jax as sj
from experiments.tasks.text_job import KERNELS
from subspace_jax.methods.low_rank.block_lora import block_lora
from subspace_jax.methods.low_rank.comp_lora import comp_lora
from subspace_jax.methods.low_rank.orthogonal_adaptation import orthogonal_adaptation
from subspace_jax.methods.low_rank.pego import pego


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of adapting.

    Attributes:
      rules: makes the rules, the head's left out.
      rate: peak learning rate, chosen on the validation split.
      needs: statistics of the training data that the method starts from.
      rules_of: makes the rules of what was gathered, where the method chooses by it; `rules` is not used then.
      optimizer: makes the method's own optimizer of a schedule; AdamW without decay if None.
    """

    rules: Callable[[], Mapping[str, Any]]
    rate: float
    needs: str | None = None
    rules_of: Callable[[Any, Any], Mapping[Any, Any]] | None = None
    optimizer: Callable[[optax.Schedule, int], optax.GradientTransformation] | None = None


def _kernels(make: Callable[[], sj.Method]) -> Callable[[], Mapping[str, Any]]:
    return lambda: {KERNELS: make()}


def _loca(schedule: optax.Schedule, steps: int) -> optax.GradientTransformation:
    # A location moves about a cell a step; it rests after a fifth of the steps, which a turn's length requires here.
    return sj.methods.loca.alternating(
        optax.adamw(schedule, weight_decay=0.0),
        optax.adam(1e-3),
        cutoff_step=max(1, steps // 5),
        coefficient_steps=3,
        location_steps=3,
    )


def _lift(schedule: optax.Schedule, steps: int) -> optax.GradientTransformation:
    del steps
    return sj.methods.lift.lift_adam(schedule)


def _budget(stats: Any, roles: Any) -> int:
    """Values of LoRA of rank 4."""
    arrays = {path: one.gradient if one.gradient is not None else one.squared_gradient for path, one in stats.items()}
    return 4 * sum(sum(roles[path].sizes(array.shape)) for path, array in arrays.items())


def _spt(stats: Any, roles: Any) -> Mapping[Any, Any]:
    found = sj.methods.spt.allocate(stats, _budget(stats, roles), roles=roles, rank=4, most=10**9)
    return {found.paths: sj.methods.spt.spt(found)}


def _composable(stats: Any, roles: Any) -> Mapping[Any, Any]:
    # The gradients of a few batches stand for the changes of full fine-tuning, which would be another run.
    sft = sj.methods.composable_sft
    scores = {path: abs(np.asarray(one.gradient)) for path, one in stats.items()}
    found = sft.Selection(sj.weights.largest_of_all(scores, _budget(stats, roles)))
    return {found.paths: sft.composable_sft(found)}


# s2ft's two shares: one of 12 heads, and 36 of 1536 channels, of every layer on average.
ARMS: dict[str, Arm] = {
    "head only": Arm(dict, 3e-2),
    "full": Arm(lambda: {"**": sj.full()}, 1e-4),
    "lora": Arm(_kernels(lambda: sj.lora(4)), 3e-3),
    "dora": Arm(_kernels(lambda: sj.dora(sj.lora(4))), 3e-3),
    "qlora": Arm(_kernels(lambda: sj.qlora(4)), 3e-3),
    "pissa": Arm(_kernels(lambda: sj.pissa(4)), 1e-3),
    "corda": Arm(_kernels(lambda: sj.corda(4)), 1e-3, needs="gram"),
    "lora_sb": Arm(_kernels(lambda: sj.lora_sb(64, learning_rate=1e-3)), 1e-3, needs="gradient"),
    "lora_xs": Arm(_kernels(lambda: sj.methods.lora_sb.lora_xs(64)), 3e-3),
    "matryoshka": Arm(_kernels(lambda: sj.matryoshka(sj.lora(4))), 1e-3),
    "orthogonal_adaptation": Arm(_kernels(lambda: orthogonal_adaptation(8, concept=0)), 1e-2),
    "comp_lora": Arm(_kernels(lambda: comp_lora(4, alpha=2.0)), 1e-2),
    "block_lora": Arm(_kernels(lambda: block_lora(6, alpha=6**0.5)), 3e-3),
    "pego": Arm(_kernels(lambda: pego(1, modules=4)), 1e-2),
    "flora": Arm(_kernels(lambda: sj.flora(4)), 1e-2),
    "randlora": Arm(_kernels(lambda: sj.randlora(32)), 3e-3),
    "oft": Arm(_kernels(lambda: sj.oft(16)), 3e-3),
    "soka": Arm(_kernels(lambda: sj.soka(4)), 3e-3),
    "loca": Arm(_kernels(lambda: sj.loca(4608)), 3e-2, optimizer=_loca),
    "svfit": Arm(_kernels(lambda: sj.svfit(384)), 1e-1),
    "loldu": Arm(_kernels(lambda: sj.loldu()), 1e-3),
    "lift": Arm(_kernels(lambda: sj.lift(4, filter_rank=32)), 3e-3, optimizer=_lift),
    "s2ft": Arm(
        lambda: {
            "backbone/encoder/**/attention/output/kernel": sj.s2ft(1 / 12, heads=12),
            "backbone/encoder/**/fc2/kernel": sj.s2ft(36 / 1536),
        },
        1e-2,
    ),
    # SaRA's entries alone: its penalty and second selection are those of an optimizer that knows the tree.
    "sara": Arm(_kernels(lambda: sj.methods.sara.sara(9.618e-4)), 1e-3),
    "spt": Arm(dict, 3e-3, needs="squared_gradient", rules_of=_spt),
    "snell": Arm(_kernels(lambda: sj.methods.snell.snell(4, sparsity=0.9)), 1e-2),
    "snella": Arm(_kernels(lambda: sj.methods.snella.snella(4, sparsity=0.9)), 1e-2),
    "composable_sft": Arm(dict, 1e-3, needs="gradient", rules_of=_composable),
    "ssf": Arm(lambda: {"backbone/encoder/**": sj.ssf()}, 3e-3),
}
