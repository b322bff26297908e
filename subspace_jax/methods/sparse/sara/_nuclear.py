"""The nuclear norm of a weight's trained entries, with the closed form of its gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, leaves_with_paths
from subspace_jax.linalg import whole_matrices
from subspace_jax.weights import SparseBlocks, SparseDelta

PenaltyMode = Literal["random_one", "all"]


class Entries(NamedTuple):
    """The trained entries of one leaf as layers of matrices.

    Attributes:
      values: `[layers, k]`.
      indices: `[layers, k]`, positions row by row; padding is in * out.
      sizes: in and out.
    """

    values: jax.Array
    indices: jax.Array
    sizes: tuple[int, int]


def nuclear_norm(adapted: Params, *, min_side: int = 64, min_entries: int = 100) -> jax.Array:
    r"""Returns the sum of nuclear norms of the trained entries of every matrix, \(\sum_l \|P_l \odot M_l\|_*\).

    \(P \odot M\) has the trained entries in their places and zeros elsewhere. The gradient is the closed form
    \((U V^T)_M\) over singular values above \(s_1 \max(d_{in}, d_{out})\,\epsilon\); no singular vector is
    differentiated, so equal and zero singular values do no harm. In a loss this is what the paper writes; `sara_adam`
    adds the gradient of one matrix a step to the clipped gradient, as the released program does.

    Args:
      adapted: a tree with weights from `sara`.
      min_side: a matrix counts if both its sides are larger; 0 for all. Convolutions and vectors never count.
      min_entries: it counts if more entries of it than this are trained (and active).

    Returns:
      A float32 scalar; 0 where no matrix counts.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.diag(jnp.array([3.0, 0.2, 0.1]))}, {"w": sj.methods.sara.sara(1.0)},
      ...                    key=jax.random.key(0))
      >>> round(float(nuclear_norm(adapted, min_side=0, min_entries=0)), 4)
      0.3
    """
    total = jnp.zeros((), jnp.float32)
    for weight in sites(adapted, min_side).values():
        one = weight.with_frozen_stopped()
        values = one.values
        if one.active is not None:
            values = jnp.where(one.active, values, 0.0)
        entries = as_layers(values, one.indices, weight)
        active = as_layers(one.active, one.indices, weight).values if one.active is not None else None
        enough = _enough(entries, active, min_entries)
        total = total + jnp.sum(jnp.where(enough, _norm(_placed(entries)), 0.0))
    return total


def sites(adapted: Params, min_side: int) -> dict[str, SparseDelta]:
    """The weights of `sara` whose matrices the penalty looks at, by path."""
    return {path: w for path, w in chosen(adapted).items() if _eligible(w, min_side)}


def chosen(adapted: Params) -> dict[str, SparseDelta]:
    """The weights that `sara` made, by path."""
    found = leaves_with_paths(adapted)
    return {
        path: w
        for path, w in found
        if isinstance(w, SparseDelta) and not isinstance(w, SparseBlocks) and w.method == "sara"
    }


def _eligible(weight: SparseDelta, min_side: int) -> bool:
    role = weight.role
    return role.is_matrix and role.kind != "conv" and min(role.sizes(weight.shape)) > min_side


def as_layers(values: jax.Array, indices: jax.Array, weight: SparseDelta) -> Entries:
    """Values and positions of a weight's entries with its stacked axes as one."""
    count = values.shape[-1]
    return Entries(values.reshape(-1, count), indices.reshape(-1, count), weight.role.sizes(weight.shape))


def gradients(
    entries: Mapping[str, Entries],
    active: Mapping[str, jax.Array],
    mode: PenaltyMode,
    min_entries: int,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """The gradient of the penalty at the active entries, `[layers, k]` by path.

    Args:
      entries: of every eligible leaf; retired entries count as zeros.
      active: `[layers, k]` bool by path.
      mode: one layer of one leaf, drawn with equal chances, or all of them.
      min_entries: a matrix with no more active entries than this gets zeros, also if it was drawn.
      key: for the draw.
    """
    if not entries:
        return {}
    held = {p: e._replace(values=jnp.where(active[p], e.values, 0.0).astype(jnp.float32)) for p, e in entries.items()}
    found = _of_all(held) if mode == "all" else _of_one(held, key)
    return {
        path: jnp.where(active[path] & _enough(held[path], active[path], min_entries)[:, None], g, 0.0)
        for path, g in found.items()
    }


def _enough(entries: Entries, active: jax.Array | None, least: int) -> jax.Array:
    """Whether every layer has more trained entries than `least`, `[layers]`."""
    real = entries.indices < math.prod(entries.sizes)
    return jnp.sum(real if active is None else real & active, axis=-1) > least


def _of_all(entries: Mapping[str, Entries]) -> dict[str, jax.Array]:
    return {path: _picked(_polar(_placed(one)), one.indices) for path, one in entries.items()}


def _of_one(entries: Mapping[str, Entries], key: jax.Array) -> dict[str, jax.Array]:
    """That of one matrix: one decomposition in each branch, one branch for each shape of matrices."""
    paths = list(entries)
    layers = [entries[path].values.shape[0] for path in paths]
    starts = [sum(layers[:i]) for i in range(len(layers))]
    drawn = jax.random.randint(key, (), 0, sum(layers))
    shapes = list(dict.fromkeys(one.sizes for one in entries.values()))

    def leaf(path: str, start: int):
        one = entries[path]
        at = jnp.clip(drawn - start, 0, one.values.shape[0] - 1)
        return lambda: _placed(Entries(one.values[at], one.indices[at], one.sizes))

    def of_shape(sizes: tuple[int, int]):
        inside = [i for i, path in enumerate(paths) if entries[path].sizes == sizes]

        def branch() -> dict[str, jax.Array]:
            which = sum((jnp.asarray(drawn >= starts[i], jnp.int32) for i in inside[1:]), jnp.zeros((), jnp.int32))
            factor = _polar(jax.lax.switch(which, [leaf(paths[i], starts[i]) for i in inside]))
            found = {path: jnp.zeros_like(one.values) for path, one in entries.items()}
            for i in inside:
                one = entries[paths[i]]
                mine = drawn - starts[i] == jnp.arange(one.values.shape[0])
                found[paths[i]] = jnp.where(mine[:, None], _picked(factor, one.indices), 0.0)
            return found

        return branch

    # Which shape the drawn matrix has: leaves are few, layers may be many.
    number = jnp.asarray([shapes.index(entries[path].sizes) for path in paths])
    owner = jnp.searchsorted(jnp.asarray(starts), drawn, side="right") - 1
    return jax.lax.switch(number[owner], [of_shape(sizes) for sizes in shapes])


def _placed(entries: Entries) -> jax.Array:
    """The matrices with the values in their places and zeros elsewhere, `[..., in, out]` float32."""
    size = math.prod(entries.sizes)

    def one(values: jax.Array, indices: jax.Array) -> jax.Array:
        return jnp.zeros(size, jnp.float32).at[indices].set(values.astype(jnp.float32), mode="drop")

    flat = jnp.vectorize(one, signature="(k),(k)->(n)")(entries.values, entries.indices)
    return whole_matrices(flat.reshape(*flat.shape[:-1], *entries.sizes))


def _picked(matrix: jax.Array, indices: jax.Array) -> jax.Array:
    """Entries of matrices `[..., in, out]` at positions `[..., k]`; 0 at padding."""
    flat = matrix.reshape(*matrix.shape[:-2], -1)
    pick = jnp.vectorize(lambda m, i: m.at[i].get(mode="fill", fill_value=0), signature="(n),(k)->(k)")
    return pick(flat, indices)


def _polar(matrix: jax.Array) -> jax.Array:
    r"""\(U V^T\) over the singular values that are not zero: the gradient of their sum."""
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    floor = s[..., :1] * max(matrix.shape[-2:]) * jnp.finfo(matrix.dtype).eps
    return jnp.matmul(jnp.where(s > floor, 1.0, 0.0)[..., None, :] * u, vt, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _norm(matrix: jax.Array) -> jax.Array:
    """Sums of singular values, `[...]`."""
    return jnp.sum(jnp.linalg.svd(matrix, compute_uv=False), axis=-1)


def _norm_forward(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _norm(matrix), matrix


def _norm_backward(matrix: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return (cotangent[..., None, None] * _polar(matrix),)


_norm.defvjp(_norm_forward, _norm_backward)
