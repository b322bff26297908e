"""Intruder dimensions: finds large singular vectors of a tuned kernel that resemble none of the pretrained one's."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, Role, Weight, check_choice, check_int, check_number, map_with_paths, register
from subspace_jax.linalg import wide_dtype, wide_matmul
from subspace_jax.merging import Selector, Site, sites, wide_array

__all__ = [
    "Intruders",
    "count_intruders",
    "effective_rank",
    "intruder_dimensions",
    "match_directions",
    "scale_intruders",
]

Side = Literal["in", "out"]

# Smaller singular values than this share of the largest belong to vectors that rounding chose.
RESOLVED = 1e-6
# Singular values nearer to each other than this, by the larger one, have no vectors of their own.
DISTINCT = 1e-4


class Intruders(NamedTuple):
    """Intruder dimensions found in one kernel; of a stack each array has its leading axes.

    Attributes:
      similarity: the largest absolute cosine of each leading tuned vector with any pretrained one, `[*stack, k]`.
      is_intruder: which of them are intruders, `[*stack, k]`.
      values: singular values of the tuned kernel, `[*stack, k]`; those of intruders where `is_intruder`.
      cosines: absolute cosines with every pretrained vector, `[*stack, k, p]`.
      is_clustered: whether a singular value is so near to its neighbor that neither has a vector of its own; their
        similarities say nothing, `[*stack, k]`.
    """

    similarity: jax.Array
    is_intruder: jax.Array
    values: jax.Array
    cosines: jax.Array
    is_clustered: jax.Array

    @property
    def count(self) -> jax.Array:
        """The number of intruders, `[*stack]`."""
        return jnp.sum(self.is_intruder, axis=-1)


def intruder_dimensions(
    before: Params,
    after: Params,
    *,
    k: int = 10,
    threshold: float = 0.5,
    side: Side = "out",
    select: Selector | None = None,
    roles: Mapping[str, Role] | None = None,
) -> dict[str, Intruders]:
    r"""Compares the leading singular vectors of tuned kernels with all of the pretrained ones.

    With \(W_0 = U_0 S_0 V_0^T\) and \(W = U S V^T\), the tuned vector \(j < k\) is an intruder if
    \(\max_i |v_j^T v_{0,i}| < \epsilon\). A kernel is decomposed at a time, adapters are formed one by one; layers of a
    stack are decomposed together. A tuned vector whose singular value is below 1e-6 of the largest is never counted.

    Args:
      before: the pretrained parameters.
      after: the tuned ones: a tree of arrays or of stand-in weights.
      k: how many leading vectors are looked at; at most the shorter side.
      threshold: \(\epsilon\); 0.5 as in the published code, 0.6 in replications.
      side: "out" compares \(V\), as published, the left vectors of an `[out, in]` matrix; "in" compares \(U\).
      select: which leaves; by default all matrices, where the publication takes those of attention and MLP.
      roles: how plain arrays are read as matrices, by path or glob; two axes are (in, out) without it.

    Returns:
      `Intruders` by path.

    Raises:
      StructureError: the trees differ.
      ValueError: an unknown side.

    Warns:
      UserWarning: singular values among the first `k` are so close that their vectors are not defined.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> before = {"w": jnp.eye(3, 5) * jnp.array([[3.0], [2.0], [1.0]])}
      >>> after = {"w": before["w"].at[2, 4].set(10.0)}
      >>> sj.methods.intruder_dimensions.intruder_dimensions(before, after)["w"].is_intruder.tolist()
      [True, False, False]
    """
    _check(k, threshold, side)
    found = {}
    for site in _matrices(before, after, select, roles):
        base, tuned = _pair(site)
        count = min(k, *tuned.shape[-2:])
        found[site.path] = _compare(base, tuned, count, side, threshold)
    clustered = [path for path, one in found.items() if bool(jnp.any(one.is_clustered))]
    if clustered:
        warnings.warn(
            f"intruder_dimensions: singular values among the first {k} differ by less than {DISTINCT:g} of the larger "
            f"one in {', '.join(clustered[:3])}{' and others' if len(clustered) > 3 else ''}; such vectors are not "
            "defined, and is_clustered marks them.",
            stacklevel=2,
        )
    return found


def count_intruders(found: Mapping[str, Intruders]) -> int:
    """Returns the number of intruders of all kernels together.

    Args:
      found: what `intruder_dimensions` returned.

    Example:
      >>> count_intruders({})
      0
    """
    return sum(int(jnp.sum(one.count)) for one in found.values())


def scale_intruders(
    before: Params,
    after: Params,
    factor: float,
    *,
    which: Literal["top", "all"] = "top",
    control: bool = False,
    k: int = 10,
    threshold: float = 0.5,
    side: Side = "out",
    select: Selector | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Params:
    r"""Scales intruders of tuned kernels: \(W + (\lambda - 1)\,s_j u_j v_j^T\).

    Args:
      before: the pretrained parameters.
      after: the tuned ones.
      factor: \(\lambda\): 0 removes, 1 changes nothing, 0.7 to 0.9 traded forgetting well in the publication.
      which: "top" scales the intruder of the largest singular value of every matrix, "all" all of the first `k`.
      control: scale, in place of the top intruder, the vector that is none and whose singular value is nearest to it,
        among the first `2 k`.
      k: how many leading vectors are looked at.
      threshold: \(\epsilon\).
      side: "out" or "in".
      select: which leaves.
      roles: how plain arrays are read as matrices.

    Returns:
      The tuned tree as arrays; a matrix without an intruder is as it was, bit by bit.

    Raises:
      StructureError: the trees differ.
      ValueError: an unknown side or `which`, or `control` of all.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> before = {"w": jnp.eye(3, 5) * jnp.array([[3.0], [2.0], [1.0]])}
      >>> after = {"w": before["w"].at[2, 4].set(10.0)}
      >>> scaled = sj.methods.intruder_dimensions.scale_intruders(before, after, 0.5)
      >>> round(float(scaled["w"][2, 4]), 4)
      5.0
    """
    _check(k, threshold, side)
    check_choice("scale_intruders: which", which, ("top", "all"))
    if control and which == "all":
        raise ValueError('scale_intruders: control=True is of one vector; expected which="top".')
    check_number("scale_intruders: factor", factor)
    changed = {}
    for site in _matrices(before, after, select, roles):
        base, tuned = _pair(site)
        count, window = (min(n, *tuned.shape[-2:]) for n in (k, 2 * k))
        matrix = _scaled(base, tuned, jnp.float32(factor), threshold, count, window, side, which, control)
        assert site.role is not None
        changed[site.path] = site.role.unmatrix(matrix, site.base.shape)

    def one(path: str, leaf: Any) -> Any:
        array = leaf.materialize() if isinstance(leaf, Weight) else leaf
        return changed[path].astype(array.dtype) if path in changed and factor != 1 else array

    return map_with_paths(one, after)


def match_directions(
    tuned: jax.Array, values: jax.Array, base: jax.Array, threshold: float
) -> tuple[jax.Array, jax.Array]:
    r"""Compares tuned singular vectors with pretrained ones and tells which are intruders.

    Args:
      tuned: tuned vectors as rows, `[*stack, k, n]`, those of the largest singular values.
      values: their singular values, `[*stack, k]`, descending.
      base: pretrained vectors as rows, `[*stack, p, n]`.
      threshold: \(\epsilon\).

    Returns:
      The absolute cosines, `[*stack, k, p]`, and whether a vector is an intruder, `[*stack, k]`: its largest cosine is
      below the threshold, and its singular value not below 1e-6 of the largest.

    Example:
      >>> import jax.numpy as jnp
      >>> match_directions(jnp.eye(3)[1:], jnp.array([2.0, 1.0]), jnp.eye(3)[:2], 0.5)[1].tolist()
      [False, True]
    """
    cosines = jnp.abs(wide_matmul(tuned, jnp.swapaxes(base, -1, -2)))
    return cosines, (jnp.max(cosines, axis=-1) < threshold) & (values >= RESOLVED * values[..., :1])


def effective_rank(matrix: jax.Array) -> jax.Array:
    r"""Returns the exponential of the entropy of singular values' shares, \(\exp(-\sum_i p_i \log p_i)\).

    Args:
      matrix: `[*stack, m, n]`; of a tuned kernel the change.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(effective_rank(jnp.eye(4))), 4)
      4.0
    """
    values = jnp.linalg.svd(matrix.astype(wide_dtype(matrix.dtype)), compute_uv=False)
    share = values / jnp.maximum(jnp.sum(values, axis=-1, keepdims=True), jnp.finfo(values.dtype).tiny)
    terms = jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0)
    return jnp.exp(-jnp.sum(terms, axis=-1))


def _check(k: int, threshold: float, side: Side) -> None:
    check_int("intruder_dimensions: k", k)
    check_number("intruder_dimensions: threshold", threshold)
    check_choice("intruder_dimensions: side", side, ("in", "out"))


def _matrices(before: Params, after: Params, select: Any, roles: Mapping[str, Role] | None) -> list[Site]:
    return [s for s in sites([after], before, select=select, roles=roles, least=1) if s.role is not None]


def _pair(site: Site) -> tuple[jax.Array, jax.Array]:
    """Base and tuned matrices `[*stack, in, out]`, in at least float32."""
    assert site.role is not None
    return site.role.matrix(wide_array(site.base)), site.role.matrix(wide_array(site.leaves[0]))


def _lead(u: jax.Array, vt: jax.Array, side: Side) -> jax.Array:
    """Singular vectors of a side as rows."""
    return vt if side == "out" else jnp.swapaxes(u, -1, -2)


def _matched(
    base: jax.Array, factors: tuple[jax.Array, jax.Array, jax.Array], count: int, side: Side, threshold: float
) -> tuple[jax.Array, jax.Array]:
    """What `match_directions` tells of the first vectors of a side."""
    u, s, vt = factors
    u0, _, vt0 = jnp.linalg.svd(base, full_matrices=False)
    lead = _lead(u[..., :count], vt[..., :count, :], side)
    return match_directions(lead, s[..., :count], _lead(u0, vt0, side), threshold)


@functools.partial(jax.jit, static_argnames=("k", "side"))
def _compare(base: jax.Array, tuned: jax.Array, k: int, side: Side, threshold: float) -> Intruders:
    u, s, vt = jnp.linalg.svd(tuned, full_matrices=False)
    cosines, is_intruder = _matched(base, (u, s, vt), k, side, threshold)
    similarity = jnp.max(cosines, axis=-1)
    near = s[..., :-1] - s[..., 1:] < DISTINCT * s[..., :-1]
    ends = jnp.zeros_like(near[..., :1])
    clustered = jnp.concatenate([near, ends], axis=-1) | jnp.concatenate([ends, near], axis=-1)
    clustered &= s >= RESOLVED * s[..., :1]
    return Intruders(similarity, is_intruder, s[..., :k], cosines, clustered[..., :k])


@functools.partial(jax.jit, static_argnames=("k", "window", "side", "which", "control"))
def _scaled(
    base: jax.Array,
    tuned: jax.Array,
    factor: jax.Array,
    threshold: float,
    k: int,
    window: int,
    side: Side,
    which: str,
    control: bool,
) -> jax.Array:
    u, s, vt = jnp.linalg.svd(tuned, full_matrices=False)
    values = s[..., :window]
    _, intrudes = _matched(base, (u, s, vt), window, side, threshold)
    leading = intrudes & (jnp.arange(window) < k)
    found = jnp.any(leading, axis=-1, keepdims=True)
    if which == "all":
        chosen = leading
    else:
        top = jnp.argmax(leading, axis=-1)
        if control:
            distance = jnp.abs(values - jnp.take_along_axis(values, top[..., None], axis=-1))
            found &= jnp.any(~intrudes, axis=-1, keepdims=True)
            top = jnp.argmin(jnp.where(intrudes, jnp.inf, distance), axis=-1)
        chosen = found & (jnp.arange(window) == top[..., None])
    amounts = jnp.where(chosen, (factor - 1) * values, 0.0)
    change = wide_matmul(u[..., :window] * amounts[..., None, :], vt[..., :window, :])
    return jnp.where(found[..., None], tuned + change, tuned)


register(
    __name__,
    title="LoRA vs Full Fine-tuning: An Illusion of Equivalence",
    authors="Shuttleworth, Andreas, Torralba, Sharma",
    year=2025,
    kinds=("analysis",),
    use_for=(
        "Looking at what a training did to a model's weights, and scaling large new directions down to forget less."
    ),
    not_for="You want a number that predicts forgetting: over our arms the count and forgetting hardly go together.",
    differs="All matrices are looked at by default, where the paper takes those of attention and MLP.",
)
