"""`oft` and the projection of its constrained form."""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import (
    Method,
    OptState,
    Params,
    Role,
    Updates,
    check_int,
    check_probability,
    is_weight,
    require_matrix,
)
from subspace_jax.linalg import skew_size
from subspace_jax.methods.structured.oft._weight import Rotated
from subspace_jax.optim import is_hole
from subspace_jax.weights import hidden_zeros


def oft(
    block_size: int | None = 32,
    *,
    blocks: int | None = None,
    share_blocks: bool = False,
    terms: int | None = None,
    magnitude: bool = False,
    dropout: float = 0.0,
) -> Method:
    r"""Trains a block-diagonal rotation of a weight's inputs: \(K' = R K\), which keeps every singular value.

    Each block is \((I + Q)(I - Q)^{-1}\) of a skew-symmetric \(Q\), zero at the start. Lengths of output columns and
    angles between them are those of the pretrained weight, whatever is learned.

    Args:
      block_size: \(b\); moved to the nearest divisor of the input size, with a warning, the smaller of two.
      blocks: number of blocks instead of their size, as in the paper; give `block_size=None` then.
      share_blocks: one rotation for all blocks.
      terms: terms of the Cayley-Neumann series (5 is usual); None solves exactly.
      magnitude: also train a factor for every output.
      dropout: share of blocks that a training step replaces by the identity; see `with_dropout`.

    Returns:
      A method whose weights are `Rotated`, with \(n_b\,b (b - 1) / 2\) trainable values each.

    Raises:
      ValueError: neither or both of `block_size` and `blocks` are given, or `dropout` is not in [0, 1).
      RankError: a number is not an integer, or too small.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((8, 4))}, {"w": sj.oft(block_size=4)}, key=jax.random.key(0))
      >>> adapted["w"].skew_entries.shape
      (2, 6)
    """
    if (block_size is None) == (blocks is None):
        raise ValueError(f"oft: give one of block_size={block_size} and blocks={blocks}, the other None.")
    block_size = None if block_size is None else check_int("oft: block_size", block_size)
    blocks = None if blocks is None else check_int("oft: blocks", blocks)
    terms = None if terms is None else check_int("oft: terms", terms, least=2)
    check_probability("oft: dropout", dropout)

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Rotated:
        del stats
        require_matrix(array, role)
        inputs, outputs = role.sizes(array.shape)
        wanted = block_size if block_size is not None else inputs / (blocks or 1)
        size = nearest_divisor(inputs, wanted)
        if size != wanted:
            warnings.warn(f"oft: {wanted} does not divide the input size {inputs}; blocks are {size}.", stacklevel=2)
        stack = role.stack_shape(array.shape)
        count = 1 if share_blocks else inputs // size
        return Rotated(
            base=array,
            skew_entries=hidden_zeros(key, (*stack, count, skew_size(size))),
            output_scale=jnp.ones((*stack, outputs), jnp.float32) if magnitude else None,
            block_size=size,
            terms=terms,
            dropout=dropout,
            role=role,
            dtype=array.dtype,
            trainable=("skew_entries", "output_scale"),
        )

    return Method("oft", make)


def nearest_divisor(number: int, wanted: float) -> int:
    """Returns the divisor of `number` nearest to `wanted`, the smaller of two.

    >>> nearest_divisor(12, 5)
    4
    """
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def coft_projection(radius: float = 6e-5) -> optax.GradientTransformation:
    r"""Keeps the rotations of OFT near the identity (COFT): \(\|Q_k\|_F \le \epsilon / \sqrt{n_b}\) after every step.

    Chain it last: it changes the update so that every larger \(Q_k\) lands on that length. Other updates pass.

    Args:
      radius: \(\epsilon\).

    Returns:
      A gradient transformation whose `update` needs `params`.

    Raises:
      ValueError: when `update` is called without `params`.

    Example:
      >>> import optax, subspace_jax as sj
      >>> optimizer = optax.chain(optax.adam(1e-3), sj.methods.oft.coft_projection(1e-3))
    """

    def init(params: Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates: Updates, state: OptState, params: Params = None) -> tuple[Updates, OptState]:
        if params is None:
            raise ValueError("coft_projection: call update(updates, state, params); it needs the weights.")

        def one(change: Any, weight: Any) -> Any:
            if is_weight(change) and not isinstance(change, Rotated):  # inside another one, such as DoRA's
                return change.map_fields(lambda n, v: one(v, getattr(weight, n)) if is_weight(v) else v)
            if not isinstance(change, Rotated) or is_hole(change.skew_entries):
                return change
            new = weight.skew_entries + change.skew_entries
            # A skew-symmetric matrix has every entry of its triangle twice.
            norm = math.sqrt(2.0) * jnp.linalg.norm(new, axis=-1, keepdims=True)
            limit = radius / math.sqrt(new.shape[-2])
            kept = new * (limit / jnp.maximum(norm, limit))
            return change.map_fields(lambda n, v: kept - weight.skew_entries if n == "skew_entries" else v)

        # A weight without gradient is None here, whatever the parameters have.
        return jax.tree.map(one, updates, params, is_leaf=lambda v: v is None or is_weight(v)), state

    return optax.GradientTransformation(init, update)
