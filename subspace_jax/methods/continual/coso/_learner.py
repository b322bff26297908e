"""CoSO as a learner: low-rank Adam orthogonal to sketches of the gradients of earlier tasks."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax

from subspace_jax.continual import Learner, LearnerState, Loss, Selector, init_opt_state, make_learner, rules_of
from subspace_jax.core import Batch, Params, PyTree, Role, StructureError, adapt, full, map_with_paths, select_paths
from subspace_jax.methods.continual.coso._memory import next_task
from subspace_jax.methods.continual.coso._transform import CosoState


def learner(
    loss: Loss,
    select: Selector | Iterable[str],
    optimizer: optax.GradientTransformation,
    *,
    energy_threshold: float = 0.98,
    min_new: int = 1,
    rules: Any = None,
    rules_optimizer: optax.GradientTransformation | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Learner:
    """Returns a learner that trains kernels by low-rank Adam, orthogonal to what earlier tasks used (CoSO).

    At the end of a task the leading directions of its sketch join the history, see `coso.next_task`; later updates
    have no component along them.

    Args:
      loss: `loss(params, batch)`, a scalar; call the model by `with_adapters`.
      select: globs or a predicate of path and array: the kernels that learn so. The paper takes attention outputs.
      optimizer: `sj.coso(...)`, with `tasks=` of the stream.
      energy_threshold: share of a task's energy that is protected.
      min_new: least number of new directions of a task.
      rules: what else learns, heads for instance, as rules of `adapt`. Biases and norms that learn would forget.
      rules_optimizer: of what `rules` select; its state begins anew with every task.
      roles: how the model uses arrays with more than two axes, from `sj.roles`.

    Returns:
      A learner whose memory between tasks is the state of `optimizer`, histories and all; while a task runs that is
      part of the optimizer's state.

    Raises:
      StructureError: at `init`, `optimizer` holds no `coso`, or `rules` comes without an optimizer or the other way
        round. At the end of a task, a history has no room for it.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> loss = lambda params, batch: sj.with_adapters(lambda p: jnp.mean((batch @ p["w"]) ** 2))(params)
      >>> learner = sj.methods.coso.learner(loss, "w", sj.coso(0.1, r1=1, r2=2, side="in", tasks=2))
      >>> state = learner.init({"w": jnp.ones((3, 2))}, jax.random.key(0))
      >>> for task in range(2):
      ...     state = learner.start_task(state, task, jax.random.key(1))
      ...     before = learner.params(state)["w"].value[task]
      ...     state, _ = learner.step(state, jnp.eye(3)[task:task + 1], jax.random.key(2))
      ...     changed = learner.params(state)["w"].value
      ...     state = learner.end_task(state, task, [])
      >>> (changed < 0.95).any(axis=1).tolist()  # the second task left the first one's direction alone
      [True, True, False]
    """
    if (rules is None) != (rules_optimizer is None):
        raise StructureError("coso.learner: give rules= and rules_optimizer= both, or neither.")

    def labels(trainable: Params) -> PyTree:
        chosen = set(select_paths(trainable, select))
        return map_with_paths(lambda path, leaf: "selected" if path in chosen else "others", trainable)

    finish = functools.partial(next_task, energy_threshold=energy_threshold, min_new=min_new)
    compiled = jax.jit(finish)
    both = optax.multi_transform({"selected": optimizer, "others": rules_optimizer or optax.identity()}, labels)

    def selected_state(adapted: Params) -> PyTree:
        held = init_opt_state(both, adapted).inner_states["selected"]
        if not any(isinstance(n, CosoState) for n in jax.tree.leaves(held, is_leaf=lambda v: isinstance(v, CosoState))):
            raise StructureError("coso.learner: optimizer= holds no coso; pass sj.coso(learning_rate, ...).")
        return held

    def start(state: LearnerState, task: int, key: jax.Array) -> LearnerState:
        del task, key
        new = init_opt_state(both, state.adapted)
        opt_state = new._replace(inner_states={**new.inner_states, "selected": state.memory})
        return state._replace(opt_state=opt_state, memory=None)

    def end(state: LearnerState, task: int, batches: Iterable[Batch]) -> LearnerState:
        del task, batches
        held = state.opt_state.inner_states["selected"]
        memory = compiled(held)
        if _is_full(memory):  # the compiled program drops what has no room; this one refuses it
            memory = finish(held)
        return state._replace(memory=memory)

    return make_learner(
        "coso",
        loss,
        both,
        adapt=lambda params, key: adapt(params, rules_of(select, full(), rules), key=key, roles=roles),
        memory=selected_state,
        start=start,
        end=end,
    )


def _is_full(state: Any) -> bool:
    """Whether a history has no column left, but directions that it does not hold."""
    nodes = jax.tree.leaves(state, is_leaf=lambda v: isinstance(v, CosoState))
    pairs = [
        (int(used.max()), *history.shape[-2:])
        for node in nodes
        if isinstance(node, CosoState)
        for used, history in zip(jax.tree.leaves(node.used), jax.tree.leaves(node.history), strict=True)
    ]
    return any(room < size and used == room for used, size, room in pairs)
