"""The state of a training run: what it carries from step to step, and how it is placed."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from subspace_jax.core import Params, PyTree, StructureError, Weight, is_weight, map_with_paths, partition, put
from subspace_jax.sharding import state_shardings


class TrainState(NamedTuple):
    """The state of a training run.

    Attributes:
      step: int32 scalar, steps taken.
      trainable: the first tree of `partition`.
      frozen: the second.
      opt_state: the optimizer's state.
      key: a random key, the same throughout; every step folds its number into it.
    """

    step: jax.Array
    trainable: Any
    frozen: Any
    opt_state: Any
    key: jax.Array


def init_train_state(
    adapted: Params,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    placed: PyTree = None,
    *,
    compute_dtype: Any = None,
) -> TrainState:
    """Makes the state before the first step, with every array placed.

    With `compute_dtype` the frozen weights are cast to it here, once, and every stand-in says that it stands for an
    array of that dtype, so that the model computes in it; what learns is kept in float32, and parts of stand-ins that
    are not of the weight's shape (bases, scales) keep their dtype. Weights that learn whole keep a float32 copy and are
    cast where they are used. A model that names a dtype of its own, as Flax modules with `dtype=` do, is built with
    the same one.

    Args:
      adapted: the tree from `adapt`; arrays of the host, of one device, or placed already.
      optimizer: any optax transformation.
      key: a random key.
      placed: `sj.shardings(adapted, ...)`; None leaves everything where it is. With several processes it is needed,
        and all of them give the same arrays.
      compute_dtype: such as `jnp.bfloat16`; None changes no dtype.

    Returns:
      The state. What learns is copied, so that a step may reuse its state's donated buffers; frozen arrays are not.

    Raises:
      StructureError: `placed` is of another tree.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(2)}, key=jax.random.key(0))
      >>> state = init_train_state(adapted, optax.adam(1e-3), jax.random.key(1), compute_dtype=jnp.bfloat16)
      >>> state.frozen["w"].base.dtype.name, state.trainable["w"].a.dtype.name, int(state.step)
      ('bfloat16', 'float32', 0)
    """
    if compute_dtype is not None:
        adapted = with_compute_dtype(adapted, compute_dtype)
    trainable, frozen = partition(adapted)
    step = jnp.zeros((), jnp.int32)
    if placed is None:
        trainable = jax.tree.map(jnp.copy, trainable)
        return TrainState(step, trainable, frozen, jax.jit(optimizer.init)(trainable), jnp.copy(key))
    leaves, structure = jax.tree.leaves(placed), jax.tree.structure(adapted)
    if len(leaves) != structure.num_leaves:
        raise StructureError(
            f"init_train_state: placed has {len(leaves)} shardings and adapted {structure.num_leaves} arrays; give "
            "sj.shardings(adapted, ...) of this very tree."
        )
    # By position: the dtype that a weight stands for is part of the structure and may just have changed.
    learns, fixed = partition(jax.tree.unflatten(structure, leaves))
    # Placing may share the caller's memory.
    trainable = jax.tree.map(lambda value, place: jnp.copy(put(value, place)), trainable, learns)
    frozen = jax.tree.map(put, frozen, fixed)
    wanted = state_shardings(optimizer, trainable, learns)
    opt_state = jax.jit(optimizer.init, out_shardings=wanted)(trainable)
    mesh = next(s.mesh for s in jax.tree.leaves(placed) if isinstance(s, NamedSharding))
    step, key = (put(value, NamedSharding(mesh, PartitionSpec())) for value in (step, key))
    return TrainState(step, trainable, frozen, opt_state, jnp.copy(key))


def with_compute_dtype(adapted: Params, dtype: Any) -> Params:
    """Makes the weights of an adapted tree stand for arrays of `dtype`, with trained values in float32."""
    dtype = jnp.dtype(dtype)

    def cast(value: Any, to: Any) -> Any:
        return value.astype(to) if jnp.issubdtype(value.dtype, jnp.floating) else value

    def convert(weight: Weight) -> Weight:
        def one(name: str, value: Any) -> Any:
            if isinstance(value, Weight):
                return convert(value)
            if name in weight.trainable:
                return cast(value, jnp.float32)
            return cast(value, dtype) if weight.axes[name] == "array" else value

        return dataclasses.replace(weight.map_fields(one), dtype=dtype)

    return map_with_paths(lambda _, leaf: convert(leaf) if is_weight(leaf) else cast(leaf, dtype), adapted)
