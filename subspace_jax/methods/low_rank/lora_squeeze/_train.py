"""Training in stages of falling rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from subspace_jax.core import OptState, Params, StructureError, partition
from subspace_jax.methods.low_rank.lora_squeeze._squeeze import loras, squeeze
from subspace_jax.methods.low_rank.lora_squeeze._stages import Stage
from subspace_jax.methods.low_rank.lora_squeeze._state import Moments, squeeze_state

Run = Callable[[Params, OptState, int, int], tuple[Params, OptState]]


def train_in_stages(
    run: Run,
    optimizer: optax.GradientTransformation,
    adapted: Params,
    plan: Sequence[Stage],
    *,
    moments: Moments = "reset",
    key: jax.Array | None = None,
    **options: Any,
) -> tuple[Params, OptState]:
    """Trains one rank after the other, squeezing between them: In-Squeeze, or with two stages Cont-Squeeze.

    Each rank is one program: shapes change between stages only. Learning-rate schedules inside the optimizer run on
    over all stages.

    Args:
      run: `run(adapted, state, first, steps)` trains `steps` steps from step number `first` on, and returns the tree
        and the optimizer's state; jitted by the caller.
      optimizer: the transformation that `run` uses.
      adapted: a tree with weights of `lora`; squeezed first where its rank is not that of the first stage.
      plan: ranks and steps, as `stages` gives them.
      moments: see `squeeze_state`.
      key: draws columns where a rank grows; see `squeeze`.
      **options: further ones of `squeeze`.

    Returns:
      The trained tree at the last rank, and the optimizer's state.

    Raises:
      StructureError: `plan` is empty, or the tree has no LoRA.

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(rank=4)}, key=jax.random.key(0))
      >>> optimizer, loss = optax.sgd(0.1), lambda tree, _: jnp.sum(sj.merge(tree)["w"] ** 2)
      >>> def run(adapted, state, first, steps):
      ...     end = sj.training.scan_steps(loss, optimizer, adapted, steps=steps, opt_state=state)
      ...     return end.adapted, end.opt_state
      >>> plan = sj.methods.lora_squeeze.stages(4, 1, 9)
      >>> trained, _ = sj.methods.lora_squeeze.train_in_stages(run, optimizer, adapted, plan)
      >>> trained["w"].a.shape, bool(loss(trained, None) < loss(adapted, None))
      ((6, 1), True)
    """
    if not plan:
        raise StructureError("train_in_stages: the plan has no stages; make one by stages(source, target, steps).")
    state: OptState = None
    first = 0
    for number, stage in enumerate(plan):
        if any(weight.rank != stage.rank for weight in loras(adapted).values()):
            own = None if key is None else jax.random.fold_in(key, number)
            before, adapted = adapted, squeeze(adapted, stage.rank, key=own, **options)
            state = state if state is None else squeeze_state(optimizer, state, before, adapted, moments=moments)
        state = optimizer.init(partition(adapted)[0]) if state is None else state
        adapted, state = run(adapted, state, first, stage.steps)
        first += stage.steps
    return adapted, state
