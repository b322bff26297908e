"""`o_lora`, its penalty, and the step to the next task."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import (
    Method,
    Params,
    Role,
    StructureError,
    check_dtype,
    check_int,
    check_probability,
    check_rank,
    key_for,
    leaves_with_paths,
    map_with_paths,
    require_matrix,
)
from subspace_jax.linalg import to_coordinates
from subspace_jax.weights import LowRank, hidden_zeros, lora_scale


def o_lora(rank: int = 8, *, tasks: int, alpha: float = 32.0, dropout: float = 0.0, dtype: Any = jnp.float32) -> Method:
    r"""Trains one low-rank adapter for each task of a sequence, beside the frozen adapters of earlier tasks.

    \(W + s \sum_{i<t} A_i B_i + s\,A_t B_t\).

    Adapters of finished tasks are the columns of one frozen pair that has room for all of them from the start, so that
    no task compiles anew. `o_lora.penalty` keeps the input sides of the tasks orthogonal, `o_lora.next_task` begins the
    next one, `merge` gives the plain weights for all tasks so far.

    Args:
      rank: of each task's adapter.
      tasks: number of tasks there is room for, the current one not counted.
      alpha: the scale is \(s\) = alpha / rank.
      dropout: probability of dropping an input of the adapter that learns; published: 0.1.
      dtype: of the factors.

    Returns:
      A method whose weights are `LowRank` (\(A_t\) `[*stack, in, rank]`, uniform; \(B_t\) `[*stack, rank, out]`, zero)
      around a frozen `LowRank` (`[*stack, in, tasks * rank]` and `[*stack, tasks * rank, out]`, zero where unused).

    Raises:
      RankError: `rank` or `tasks` is not a positive integer.
      RoleError: an array is not known to be a matrix; raised by `adapt`, with the path.
      ValueError: `alpha` is not a positive number, `dropout` is not in [0, 1), or an unknown `dtype`.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.o_lora(2, tasks=3)}, key=jax.random.key(0))
      >>> adapted["w"].a.shape, adapted["w"].base.a.shape, float(sj.methods.o_lora.penalty(adapted))
      ((6, 2), (6, 6), 0.0)
    """
    rank, tasks = check_rank(rank, what="o_lora: rank"), check_int("o_lora: tasks", tasks)
    check_probability("o_lora: dropout", dropout)
    dtype = check_dtype("o_lora: dtype", dtype)
    scale = lora_scale(rank, alpha, what="o_lora: alpha")

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> LowRank:
        del stats
        require_matrix(array, role)
        stack, (inputs, outputs) = role.stack_shape(array.shape), role.sizes(array.shape)
        common: dict[str, Any] = {"role": role, "dtype": array.dtype, "scale": scale}
        finished = LowRank(
            base=array,
            a=hidden_zeros(key, (*stack, inputs, tasks * rank), dtype),
            b=hidden_zeros(key, (*stack, tasks * rank, outputs), dtype),
            trainable=(),
            **common,
        )
        return LowRank(
            base=finished,
            a=_draw(key, (*stack, inputs, rank), dtype),
            b=hidden_zeros(key, (*stack, rank, outputs), dtype),
            dropout=dropout,
            trainable=("a", "b"),
            **common,
        )

    return Method("o_lora", make)


def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    bound = 1.0 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


def _weights(adapted: Params) -> list[tuple[str, LowRank]]:
    found = [(path, w) for path, w in leaves_with_paths(adapted) if _is_ours(w)]
    if not found:
        raise StructureError(
            "There are no weights of o_lora in this tree. Give the adapted tree, or inside a loss what "
            "combine(trainable, frozen) returns."
        )
    return found


def _is_ours(weight: Any) -> bool:
    """Whether it is an adapter that learns over a frozen one with room for whole adapters of its rank."""
    if not isinstance(weight, LowRank) or not isinstance(weight.base, LowRank) or weight.base.trainable:
        return False
    return weight.a is not None and weight.base.a is not None and weight.base.rank % weight.rank == 0


def penalty(adapted: Params, overlap_weight: float = 0.5, norm_weight: float = 0.0) -> jax.Array:
    r"""Returns the overlap of the adapter's input side with those of earlier tasks, which O-LoRA adds to the loss.

    \(\lambda_1 \sum_{i<t} \sum |A_i^T A_t| + \lambda_2\,(\|A_t\|_F + \|B_t\|_F)\), summed over weights: absolute
    entries, on the side of the inputs, as the authors' code has it; the paper writes the other side.

    Args:
      adapted: a tree with weights of `o_lora`; in a loss what `combine` returns, so that only the new factors learn.
      overlap_weight: \(\lambda_1\).
      norm_weight: \(\lambda_2\).

    Returns:
      A float32 scalar; zero at the first task if `norm_weight` is.

    Raises:
      StructureError: the tree has no such weight.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.o_lora(1, tasks=1)}, key=jax.random.key(0))
      >>> adapted = sj.methods.o_lora.next_task(adapted, 0, key=jax.random.key(1))
      >>> float(sj.methods.o_lora.penalty(adapted)) > 0
      True
    """
    total = jnp.zeros(())
    for _, weight in _weights(adapted):
        old = lax.stop_gradient(weight.base.a)  # pyright: ignore[reportAttributeAccessIssue]
        total += overlap_weight * jnp.sum(jnp.abs(to_coordinates(weight.a, old)))
        if not (isinstance(norm_weight, (int, float)) and norm_weight == 0):
            total += norm_weight * (_norm(weight.a) + _norm(weight.b))
    return total


def _norm(array: jax.Array) -> jax.Array:
    """The sum of Frobenius norms over a stack, with gradient zero at zero."""
    squares = jnp.sum(jnp.square(array.astype(jnp.float32)), axis=(-2, -1))
    return jnp.sum(jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0))


def next_task(adapted: Params, task: Any, *, key: jax.Array) -> Params:
    """Freezes the adapter that learned beside those of earlier tasks, and puts a new one in its place.

    The model's outputs stay as they are; shapes do too. Start the optimizer's moments anew: see `reset_moments`.

    Args:
      adapted: a tree with weights of `o_lora`.
      task: number of the task that is finished, from zero; a number or an int scalar array.
      key: draws the new input sides; it is consumed.

    Returns:
      A tree like the given one.

    Raises:
      StructureError: the tree has no such weight, or no room for this task.
    """
    for path, weight in _weights(adapted):
        room = weight.base.a.shape[-1] // weight.rank  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(task, int) and not 0 <= task < room:
            raise StructureError(f"{path}: task {task}; there is room for tasks 0 to {room - 1}: see o_lora(tasks=).")

    def one(path: str, weight: Any) -> Any:
        if not _is_ours(weight):
            return weight
        first = task * weight.rank
        # Of a confined weight the projected ones: the frozen pair has no projection of its own.
        a, b = (v.astype(weight.base.a.dtype) for v in weight.original_factors())
        base = dataclasses.replace(
            weight.base,
            a=lax.dynamic_update_slice_in_dim(weight.base.a, a, first, axis=-1),
            b=lax.dynamic_update_slice_in_dim(weight.base.b, b, first, axis=-2),
        )
        own = key_for(key, path)
        drawn = _draw(own, weight.a.shape, weight.a.dtype)
        return dataclasses.replace(weight, base=base, a=drawn, b=hidden_zeros(own, weight.b.shape, weight.b.dtype))

    return map_with_paths(one, adapted)
