"""How far updates of weights are from having orthonormal columns, or rows where those are fewer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import Params, Role, RoleError, Weight, is_weight, leaves_with_paths
from subspace_jax.linalg import wide_dtype, wide_matmul
from subspace_jax.merging import Factored, Selector, Site, formed, read_change, sites

TINY = 1e-12


def penalty(
    params: Params,
    base: Params,
    *,
    squared: bool = False,
    select: Selector | None = None,
    roles: Mapping[str, Role] | None = None,
) -> jax.Array:
    r"""Returns how far the updates \(D = W - W_0\) are from orthonormal, summed over kernels and over stacks.

    \(\sum_l \|D_l^T D_l - I\|_F\), of the smaller Gram matrix, so that a kernel and its transpose have one value: with
    singular values \(\sigma\) of D the square is \(\sum_i (\sigma_i^2 - 1)^2\). Add it to the loss of every task,
    times 0.1 to 100; it needs nothing of other tasks. The pull is toward singular values of one, whatever the size of
    the weights: watch \(\|D\|\).

    At \(D = 0\) its gradient is zero, so the task's loss makes the first step, and what it makes is then amplified.
    LoRA's gradients are both zero while `b` is. Low-rank updates enter by their factors, in products of the rank's
    size; a rank r below the smaller side m leaves \(\sqrt{m - r}\) at least.

    Args:
      params: \(W\), arrays or stand-in weights.
      base: \(W_0\), the tree that they were trained from; no gradient reaches it.
      squared: \(\|\cdot\|_F^2\), the publication's equation. Its code has the norm itself, of which the same factor in
        front is another strength, by \(2 \|\cdot\|_F\); close to the minimum its gradient keeps a norm of up to 2, so
        that a fixed step stops about a step away from it.
      select: which kernels, as globs or a predicate of path and array. None for all that learn and are dense: stand-in
        weights if there are any, else arrays with two axes, embedding tables among them unless `roles` tells. Those of
        attention alone are the publication's ATT-FT, in which they alone learn.
      roles: how the model uses plain arrays, from `sj.roles`; convolutions, which count only if selected, are then
        matrices `[window * in, out]`.

    Returns:
      A scalar in float32 (float64 if an array is that).

    Raises:
      RoleError: what is selected is no matrix, or nothing is.
      StructureError: the trees differ, or an adapter stands on other values than the base.
      PatternError: a glob matches nothing.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> base, moved = {"w": jnp.ones((3, 2))}, {"w": jnp.ones((3, 2)) + 2 * jnp.eye(3)[:, :2]}
      >>> [round(float(sj.methods.orthoreg.penalty(p, base, squared=True)), 3) for p in (base, moved)]
      [2.0, 18.0]
    """
    total = jnp.zeros(())
    for site in kernels(params, base, select, roles):
        squares = _squares_of(site)
        total = total + jnp.sum(squares if squared else jnp.sqrt(squares + TINY))
    return total


def low_rank_penalty(a: jax.Array, b: jax.Array, scale: float | jax.Array = 1.0, *, squared: bool = False) -> jax.Array:
    r"""Returns the penalty of an update \(D = s\,a\,b\), without forming it.

    \(\|D^T D - I\|_F^2 = \mathrm{tr} M^2 - 2\,\mathrm{tr} M + m\) with \(M = s^2\,a^T a\,b b^T\), \(r \times r\).

    Args:
      a: `[*stack, in, rank]`.
      b: `[*stack, rank, out]`.
      scale: \(s\), \(\alpha / r\).
      squared: as in `penalty`.

    Returns:
      A scalar in at least float32, at least \(m - r\) if squared, m being the smaller side.

    Example:
      >>> import jax.numpy as jnp
      >>> float(low_rank_penalty(jnp.eye(4)[:, :1], jnp.eye(4)[:1], squared=True))
      3.0
    """
    squares = _low_rank_squares(a * scale, b)
    return jnp.sum(squares if squared else jnp.sqrt(squares + TINY))


def kernels(params: Params, base: Params, select: Selector | None, roles: Mapping[str, Role] | None) -> list[Site]:
    """Returns the leaves whose updates count, in the order of the tree."""
    found = sites([params], base, select=select, roles=roles, least=1)
    if select is None:
        adapted = any(is_weight(leaf) for _, leaf in leaves_with_paths(params))
        found = [site for site in found if _counts(site, adapted)]
        if not found:
            raise RoleError(
                "orthoreg: no dense kernel learns here. Pass select= and, for arrays with more than two axes, "
                "roles=sj.roles(fn, params, ...)."
            )
    for site in found:
        if site.role is None:
            raise RoleError(
                f"{site.path}: shape {tuple(site.base.shape)} is not known to be a matrix; expected a kernel. Leave it "
                "out of select=, or tell how it is used by roles=sj.roles(fn, params, ...)."
            )
    return found


def gram(matrix: jax.Array) -> jax.Array:
    """Returns the smaller Gram matrix, `[*stack, m, m]`, whole on every device."""
    other = jnp.swapaxes(matrix, -1, -2)
    pair = (other, matrix) if matrix.shape[-2] >= matrix.shape[-1] else (matrix, other)
    return wide_matmul(*pair, split=(None, None))


def change_of(site: Site) -> Any:
    """The update of a leaf; nothing that does not learn is differentiated."""
    leaf = site.leaves[0]
    leaf = leaf.with_frozen_stopped() if isinstance(leaf, Weight) else leaf
    return read_change(site.path, leaf, lax.stop_gradient(site.base))


def matrix_of(site: Site, change: Any) -> jax.Array:
    """The update as matrices, `[*stack, in, out]` in at least float32."""
    assert site.role is not None
    matrix = site.role.matrix(formed(change, site.base))
    return matrix.astype(wide_dtype(matrix.dtype))


def _counts(site: Site, adapted: bool) -> bool:
    leaf = site.leaves[0]
    if adapted and not (isinstance(leaf, Weight) and leaf.trainable):
        return False
    return site.role is not None and site.role.kind == "dense"


def _squares_of(site: Site) -> jax.Array:
    change = change_of(site)
    if isinstance(change, Factored) and change.gain is None and _is_low(change):
        return _low_rank_squares(change.a, change.b)
    error = gram(matrix_of(site, change))
    return jnp.sum(jnp.square(error - jnp.eye(error.shape[-1], dtype=error.dtype)), (-2, -1))


def _is_low(change: Factored) -> bool:
    """Whether the rank's products are the smaller ones, and no singular value close to one is lost in a difference."""
    return change.a.shape[-1] < min(change.a.shape[-2], change.b.shape[-1])


def _low_rank_squares(a: jax.Array, b: jax.Array) -> jax.Array:
    left = wide_matmul(jnp.swapaxes(a, -1, -2), a, split=(None, None))
    right = wide_matmul(b, jnp.swapaxes(b, -1, -2), split=(None, None))
    middle = wide_matmul(left, right, split=(None, None))
    squares = jnp.sum(middle * jnp.swapaxes(middle, -1, -2), (-2, -1))
    least = min(a.shape[-2], b.shape[-1])
    found = squares - 2 * jnp.trace(middle, axis1=-2, axis2=-1) + least
    return jnp.maximum(found, 0.0)
