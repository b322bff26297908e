"""What becomes of an optimizer's state where the rank changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import OptState, Params, check_choice, partition
from subspace_jax.linalg import wide_matmul
from subspace_jax.methods.low_rank.lora_squeeze._squeeze import loras
from subspace_jax.optim import FIRST_MOMENTS, SECOND_MOMENTS, map_moments, reset_moments
from subspace_jax.weights import LowRank, map_weights

Moments = Literal["reset", "project"]


def squeeze_state(
    optimizer: optax.GradientTransformation,
    state: OptState,
    before: Params,
    after: Params,
    *,
    moments: Moments = "reset",
) -> OptState:
    r"""Returns the optimizer's state for the adapters that `squeeze` made.

    "reset" starts all moments anew, with the count that corrects their bias; counts of schedules go on. "project"
    transforms them: with \(a' = a\,T_a\) and \(b' = T_b\,b\), gradients become
    \(m_{a'} = \frac{s'}{s} m_a T_b^T\) and \(m_{b'} = \frac{s'}{s} T_a^T m_b\), exactly where nothing was cut off, and
    second moments likewise with squared coefficients, as if entries were uncorrelated. Moments of new or dead channels
    are zero.

    Args:
      optimizer: the transformation.
      state: its state before.
      before: the adapted tree before.
      after: what `squeeze` made of it.
      moments: "reset" or "project".

    Raises:
      ValueError: `moments` is neither.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(rank=3)}, key=jax.random.key(0))
      >>> optimizer = optax.adam(1e-3)
      >>> state = optimizer.init(sj.partition(adapted)[0])
      >>> small = sj.methods.lora_squeeze.squeeze(adapted, 1)
      >>> sj.methods.lora_squeeze.squeeze_state(optimizer, state, adapted, small)[0].mu["w"].a.shape
      (6, 1)
    """
    check_choice("squeeze_state: moments", moments, get_args(Moments))
    fresh = optimizer.init(partition(after)[0])
    if moments == "reset":
        # Counts of schedules are the leaves that keep their shape and are not moments.
        old = jax.tree.leaves(reset_moments(state))
        leaves, treedef = jax.tree.flatten(fresh)
        kept = [o if o.shape == f.shape else f for f, o in zip(leaves, old, strict=True)]
        return jax.tree.unflatten(treedef, kept)
    old, new = loras(before), loras(after)
    maps = {path: _transforms(old[path], weight) for path, weight in new.items() if weight.a is not old[path].a}

    def project(squares: bool) -> Callable[[Any], Any]:
        def one(path: str, moment: LowRank) -> LowRank:
            if path not in maps:
                return moment
            left, right = maps[path].squared() if squares else maps[path]
            shapes = moment.a.dtype, moment.b.dtype
            a, b = wide_matmul(moment.a, left).astype(shapes[0]), wide_matmul(right, moment.b).astype(shapes[1])
            return dataclasses.replace(moment, a=a, b=b)

        return lambda tree: map_weights(LowRank, one, tree)

    functions: dict[str, Callable[[Any], Any]] = {}
    functions |= dict.fromkeys(FIRST_MOMENTS, project(False)) | dict.fromkeys(SECOND_MOMENTS, project(True))
    return map_moments(state, functions)


class _Maps(NamedTuple):
    """What moments of `a` are multiplied with on the right, and those of `b` on the left."""

    left: jax.Array
    right: jax.Array

    def squared(self) -> _Maps:
        return _Maps(self.left**2, self.right**2)


def _transforms(before: LowRank, after: LowRank) -> _Maps:
    r"""With \(a' b' = \frac{s}{s'} U S V^T\): \(T_a = b\,b'^T / S\) and \(T_b = a'^T a / S\), up to the scales."""
    ratio = before.scale / after.scale
    a, b = after.a.astype(jnp.float32), after.b.astype(jnp.float32)
    values = jnp.sum(b * b, axis=-1) / ratio
    inverse = jnp.where(values > 0, 1.0 / jnp.where(values > 0, values, 1.0), 0.0)
    t_a = wide_matmul(before.b, jnp.swapaxes(b, -1, -2)) * inverse[..., None, :]
    t_b = wide_matmul(jnp.swapaxes(a, -1, -2), before.a) * inverse[..., :, None]
    return _Maps(jnp.swapaxes(t_b, -1, -2) / ratio, jnp.swapaxes(t_a, -1, -2) / ratio)
