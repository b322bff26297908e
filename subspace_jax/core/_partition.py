"""Splits an adapted tree into trainable and frozen arrays, and joins it again."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core._compat import is_tracer
from subspace_jax.core._errors import StructureError
from subspace_jax.core._paths import map_with_paths, path_string
from subspace_jax.core._types import Params, PyTree
from subspace_jax.core._weight import Weight, is_weight


def partition(adapted: Params) -> tuple[Params, Params]:
    """Splits a tree into its trainable and its frozen arrays.

    Trainable are the fields that each stand-in weight names as such; frozen is everything else, plain arrays
    included. Differentiate the first tree and give it alone to the optimizer, so nothing is ever allocated for frozen
    weights: no gradients, no clipping norms, no optimizer states.

    Args:
      adapted: a tree with stand-in weights.

    Returns:
      `(trainable, frozen)`, two trees of the structure of `adapted` with None in the holes.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> adapted = sj.adapt(params, {"kernel": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> trainable, frozen = sj.partition(adapted)
      >>> trainable["kernel"].a.shape, trainable["kernel"].base, trainable["bias"]
      ((4, 2), None, None)
      >>> frozen["kernel"].base.shape, frozen["kernel"].a
      ((4, 3), None)
    """
    return _select(adapted, True), _select(adapted, False)


def _select(tree: PyTree, wanted: bool) -> Params:
    def select(weight: Weight) -> Weight:
        def one(name: str, value: Any) -> Any:
            if isinstance(value, Weight):
                return select(value)
            return value if (name in weight.trainable) == wanted else None

        return weight.map_fields(one)

    def leaf(path: str, value: Any) -> Any:
        if isinstance(value, Weight):
            return select(value)
        return None if wanted else value

    return map_with_paths(leaf, tree)


def combine(trainable: Params, frozen: Params) -> Params:
    """Joins the two trees of `partition`.

    Inside a differentiated function the frozen arrays come back with their gradients stopped, so that nothing is
    spent on them even where the caller differentiates everything.

    Args:
      trainable: the first tree of `partition`, or an update of it.
      frozen: the second.

    Returns:
      The adapted tree.

    Raises:
      StructureError: both trees have an array at one place, or they are not of one structure.

    Example:
      >>> import jax.numpy as jnp
      >>> combine({"a": None, "b": jnp.ones(())}, {"a": jnp.zeros(()), "b": None})
      {'a': Array(0., dtype=float32), 'b': Array(1., dtype=float32)}
    """

    def join(path: Any, fixed: Any, learned: Any) -> Any:
        if learned is not None and fixed is not None:
            raise StructureError(
                f"{path_string(path)}: both trees have a value here, of shapes {jnp.shape(learned)} and "
                f"{jnp.shape(fixed)}. "
                "combine() takes the two trees that partition() gave, or updates of the first."
            )
        if learned is not None:
            return learned
        # Only a tracer can carry a gradient; a concrete array would be copied for nothing.
        return jax.lax.stop_gradient(fixed) if is_tracer(fixed) else fixed

    structures = [jax.tree.structure(tree, is_leaf=_is_hole) for tree in (trainable, frozen)]
    if structures[0] != structures[1]:
        raise StructureError(
            f"The trainable and the frozen tree differ in structure{_first_difference(trainable, frozen)}. Both must "
            "come from one partition()."
        )
    # The frozen tree's structure: its remarks are the weights' own, an optimizer step's are those of its first call.
    return jax.tree_util.tree_map_with_path(join, frozen, trainable, is_leaf=_is_hole)


def _is_hole(value: Any) -> bool:
    return value is None


def _first_difference(trainable: Params, frozen: Params) -> str:
    """Says where two trees differ, if their paths already tell."""
    flat = (jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_hole) for tree in (trainable, frozen))
    left, right = ({path_string(path) for path, _ in leaves} for leaves in flat)
    only = sorted(left - right) + sorted(right - left)
    if not only:
        return ""
    return f": {only[0]} is in the {'trainable' if only[0] in left else 'frozen'} one only"


def with_dropout(adapted: Params, key: jax.Array) -> Params:
    """Switches on what is random in training (dropout, drawn parts, noise) of all stand-in weights, for one step.

    Each weight folds its own path into the key, so that masks differ between weights; give another key at every
    step. Without this call nothing is dropped.

    Args:
      adapted: a tree with stand-in weights.
      key: a random key; it is consumed.

    Returns:
      The tree with keys inside those weights.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((4, 3))}, {"w": sj.lora(rank=2, dropout=0.5)}, key=jax.random.key(0))
      >>> with_dropout(adapted, jax.random.key(1))["w"].dropout_key is None
      False
    """

    # An old-style key is two numbers; stacked weights hold an array of keys.
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        key = jax.random.wrap_key_data(key)

    def one(path: str, value: Any) -> Any:
        return value.with_key(key_for(key, path)) if is_weight(value) else value

    return map_with_paths(one, adapted)


def key_for(key: jax.Array, path: str) -> jax.Array:
    """Returns the key of one leaf: the same whatever other leaves there are."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
