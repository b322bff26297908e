"""CorDA: splits a weight by the covariance of its inputs and trains one part."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import (
    Method,
    Role,
    StatisticsError,
    check_choice,
    check_dtype,
    check_int,
    check_number,
    check_rank,
    register,
    require_matrix,
)
from subspace_jax.linalg import randomized_svd, truncated_svd, whole_matrices, wide_dtype
from subspace_jax.weights import LowRank, lora_scale

__all__ = [
    "Damped",
    "corda",
    "damped_covariance",
]


Mode = Literal["instruction_previewed", "knowledge_preserved", "ipm", "kpm"]
_MODES = {"ipm": "instruction_previewed", "kpm": "knowledge_preserved"}

# Below this share of the largest value the trained components hold nothing that float32 could tell from zero.
NEGLIGIBLE = 1e-6


def corda(
    rank: int,
    *,
    mode: Mode = "instruction_previewed",
    alpha: float | None = None,
    damping: float = 0.01,
    threshold: float = 0.05,
    doublings: int = 30,
    svd: Literal["exact", "randomized"] = "exact",
    iterations: int = 4,
    oversample: int = 8,
    factors: Literal["projection", "solve"] = "projection",
    balanced: bool = False,
    residual_dtype: Any = None,
    dtype: Any = jnp.float32,
) -> Method:
    r"""Trains the part of a weight that matters most, or least, for data whose inputs were captured.

    With the covariance \(C\) of the weight's inputs, damped to be invertible, \(C W = P S Q^T\), and \(I\) the first
    \(r\) components (instruction-previewed) or the last \(r\) (knowledge-preserved): \(a = C^{-1} P_I \sqrt{S_I / s}\),
    \(b = \sqrt{S_I / s}\,Q_I^T\) with \(s = \alpha / r\), and the frozen residual is \(W - s\,a\,b\), subtracted in
    float32 from the factors as they are stored. It equals \(W (I - Q_I Q_I^T)\).

    The covariance is `stats.gram` divided by the number of examples: for the published one capture it with
    `scale_examples="max_abs"` (or "signed_max", as the authors' code scales). A factor \(c\) of the covariance changes
    neither product nor residual; it divides `a` and multiplies `b` by \(\sqrt{c}\), and so changes how Adam trains
    them.

    Args:
      rank: \(r\), at most the weight's smaller side.
      mode: "instruction_previewed" ("ipm") trains what matters most for the captured data, which is that of the new
        task; "knowledge_preserved" ("kpm") trains what matters least for them, which is what must not be forgotten.
      alpha: \(\alpha\); `rank` if None, so that \(s = 1\).
      damping: first multiple of the mean of the covariance's diagonal that is added to it.
      threshold: the damping doubles until \(\|C C^{-1} - I\|_F\) is below this.
      doublings: largest number of times that it doubles.
      svd: "exact", or "randomized", which finds the first components only.
      iterations: power iterations of the randomized decomposition.
      oversample: its extra columns.
      factors: "projection" computes `a` as \(W Q_I / \sqrt{s S_I}\), which is the same and needs no inverse, so that
        rounding does not grow with the condition of \(C\); "solve" by the Cholesky factor of \(C\), as it is defined.
      balanced: rescales each column of `a` and row of `b` to equal norms, which leaves the product as it is. Without
        it knowledge-preserving factors differ in size by a factor of 100 and more.
      residual_dtype: dtype of the frozen residual; that of the weight if None.
      dtype: dtype of the factors.

    Returns:
      A method that needs the statistic "gram", whose weights are `LowRank` with a residual base, `a`
      `[*stack, in, rank]` and `b` `[*stack, rank, out]`. `to_lora` rewrites them on the untouched weight.

    Raises:
      RankError: `rank` is above the weight's smaller side; raised by `adapt`, with the path.
      StatisticsError: Grams were not captured, have another shape, or no damping makes them invertible; likewise.
      ValueError: another option is out of its range, or `dtype` is float16.

    Warning:
      In the knowledge-preserved mode a weight of deficient rank has components of size zero, on which both factors
      vanish and nothing learns; `adapt` warns where all of them are below 1e-6 of the largest. Biases stay frozen;
      the authors' own layer trains them, which a rule with `full()` does.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params, x = {"w": jax.random.normal(jax.random.key(1), (6, 4))}, jax.random.normal(jax.random.key(2), (50, 6))
      >>> stats = sj.capture(lambda p, x: x @ p["w"], params, [x], scale_examples="max_abs")
      >>> adapted = sj.adapt(params, {"w": sj.corda(rank=2, mode="kpm")}, key=jax.random.key(0), stats=stats)
      >>> bool(jnp.allclose(sj.merge(adapted)["w"], params["w"], atol=1e-5))
      True
    """
    rank, dtype = check_rank(rank, what="corda: rank"), check_dtype("corda: dtype", dtype)
    scale = lora_scale(rank, alpha, what="corda: alpha")
    check_choice("corda: mode", mode, (*_MODES.values(), *_MODES))
    check_choice("corda: svd", svd, ("exact", "randomized"))
    check_choice("corda: factors", factors, ("projection", "solve"))
    iterations = check_int("corda: iterations", iterations, least=0)
    oversample = check_int("corda: oversample", oversample, least=0)
    doublings = _check_damping("corda", damping, threshold, doublings)
    last = _MODES.get(mode, mode) == "knowledge_preserved"
    if last and svd == "randomized":
        raise ValueError("corda: a randomized decomposition finds the first components; knowledge is kept by the last.")
    options = {"rank": rank, "scale": scale, "last": last, "svd": svd, "iterations": iterations}
    options |= {"oversample": oversample, "solve": factors == "solve", "balanced": balanced, "dtype": dtype}

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> LowRank:
        require_matrix(array, role)
        check_rank(rank, min(role.sizes(array.shape)))
        matrix = role.matrix(array).astype(wide_dtype(array.dtype))
        covariance = _covariance(stats, matrix)
        damped = damped_covariance(covariance, damping=damping, threshold=threshold, doublings=doublings)
        found = _decompose(key, matrix, damped.covariance, damped.factor, **options)
        _warn_of_nothing(found, array.shape)
        wide = wide_dtype(dtype)
        product = _times(found.a.astype(wide) * scale, found.b.astype(wide))
        return LowRank(
            base=role.unmatrix(matrix - product, array.shape).astype(residual_dtype or array.dtype),
            a=found.a,
            b=found.b,
            # Copies: a donated step would otherwise hand the same buffer in twice.
            start_a=jnp.copy(found.a),
            start_b=jnp.copy(found.b),
            scale=scale,
            role=role,
            dtype=array.dtype,
            trainable=("a", "b"),
        )

    return Method("corda", make, needs=("gram",))


class Damped(NamedTuple):
    """A covariance made invertible.

    Attributes:
      covariance: `[*stack, n, n]`.
      factor: its lower Cholesky factor, `[*stack, n, n]`.
      damping: the multiple of the mean of the diagonal that was added, `[*stack]`.
      error: Frobenius norm of the covariance times its inverse minus the identity, `[*stack]`.
    """

    covariance: jax.Array
    factor: jax.Array
    damping: jax.Array
    error: jax.Array


def damped_covariance(
    covariance: jax.Array, *, damping: float = 0.01, threshold: float = 0.05, doublings: int = 30
) -> Damped:
    r"""Adds a multiple of the mean of its diagonal to a covariance until float32 can invert it.

    \(C + d\,\overline{\mathrm{diag}\,C}\,I\), with \(d\) doubled while \(\|C C^{-1} - I\|_F\) is not below the
    threshold; each matrix of a stack has its own \(d\).

    Args:
      covariance: `[*stack, n, n]`, symmetric and positive semidefinite.
      damping: the first \(d\).
      threshold: of the error.
      doublings: largest number of doublings.

    Returns:
      The damped covariance with its factor, \(d\) and error.

    Raises:
      StatisticsError: no \(d\) is large enough. Not raised where values are abstract.
      ValueError: `damping` or `threshold` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> damped_covariance(jnp.eye(3)).covariance[0].tolist()
      [1.0099999904632568, 0.0, 0.0]
    """
    doublings = _check_damping("damped_covariance", damping, threshold, doublings)
    found = _damp(covariance, damping, threshold, doublings)
    try:
        sound = bool(jnp.all(found.error < threshold))
    except jax.errors.ConcretizationTypeError:
        return found
    if not sound:
        raise StatisticsError(
            f"the covariance of shape {covariance.shape} is not invertible after {doublings} doublings of the damping "
            f"{damping}: the error is {float(jnp.max(found.error)):.3g}, expected below {threshold}. It holds NaN or "
            "zeros only, or the threshold is below what float32 can reach; capture inputs of this weight in float32."
        )
    return found


def _check_damping(name: str, damping: Any, threshold: Any, doublings: Any) -> int:
    check_number(f"{name}: damping", damping, above=0.0)  # nothing doubled is nothing
    check_number(f"{name}: threshold", threshold, above=0.0)
    return check_int(f"{name}: doublings", doublings, least=0)


@functools.partial(jax.jit, static_argnums=3)
def _damp(covariance: jax.Array, damping: float, threshold: float, doublings: int) -> Damped:
    covariance = whole_matrices(covariance).astype(wide_dtype(covariance.dtype))
    diagonal = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    unit = jnp.mean(diagonal, axis=-1)
    eye = jnp.eye(covariance.shape[-1], dtype=covariance.dtype)

    def attempt(d: jax.Array) -> Damped:
        damped = covariance + (d * unit)[..., None, None] * eye
        factor = jnp.linalg.cholesky(damped)
        inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.broadcast_to(eye, damped.shape))
        return Damped(damped, factor, d, jnp.sqrt(jnp.sum((_times(damped, inverse) - eye) ** 2, axis=(-2, -1))))

    def failed(found: Damped) -> jax.Array:
        return ~(found.error < threshold)  # NaN has failed too

    def again(state: tuple[jax.Array, Damped]) -> tuple[jax.Array, Damped]:
        count, found = state
        return count + 1, attempt(jnp.where(failed(found), 2.0 * found.damping, found.damping))

    def unfinished(state: tuple[jax.Array, Damped]) -> jax.Array:
        return (state[0] < doublings) & jnp.any(failed(state[1]))

    return lax.while_loop(unfinished, again, (jnp.int32(0), attempt(jnp.full_like(unit, damping))))[1]


class _Components(NamedTuple):
    """Factors, with the largest value among the components taken and among all, each `[*stack]`."""

    a: jax.Array
    b: jax.Array
    taken: jax.Array
    largest: jax.Array


# One compiled program per shape and setting, whichever call of `corda` it comes from.
@functools.partial(
    jax.jit,
    static_argnames=("rank", "scale", "last", "svd", "iterations", "oversample", "solve", "balanced", "dtype"),
)
def _decompose(
    key: jax.Array,
    matrix: jax.Array,
    covariance: jax.Array,
    factor: jax.Array,
    *,
    rank: int,
    scale: float,
    last: bool,
    svd: str,
    iterations: int,
    oversample: int,
    solve: bool,
    balanced: bool,
    dtype: Any,
) -> _Components:
    """The first or last components of `covariance @ matrix`, in factors of `matrix`."""
    matrix = whole_matrices(matrix)
    weighted = _times(covariance, matrix)
    if svd == "randomized":
        p, s, qt = randomized_svd(key, weighted, rank, iterations=iterations, oversample=oversample)
    else:
        p, s, qt = truncated_svd(weighted, min(matrix.shape[-2:]))
    largest = s[..., 0]
    chosen = slice(-rank, None) if last else slice(rank)
    p, s, qt = p[..., chosen], s[..., chosen], qt[..., chosen, :]
    if solve:
        root = jnp.sqrt(s / scale)
        a = jax.scipy.linalg.cho_solve((factor, True), p * root[..., None, :])
    else:
        # Values below rounding are those of zero; the product does not depend on them.
        root = jnp.sqrt(jnp.maximum(s, jnp.finfo(s.dtype).eps * largest[..., None]) / scale)
        a = _times(matrix, jnp.swapaxes(qt, -1, -2)) / jnp.where(root > 0, scale * root, 1.0)[..., None, :]
    b = root[..., :, None] * qt
    if balanced:
        left, right = jnp.linalg.norm(a, axis=-2), jnp.linalg.norm(b, axis=-1)
        ratio = jnp.where((left > 0) & (right > 0), jnp.sqrt(right / jnp.where(left > 0, left, 1.0)), 1.0)
        a, b = a * ratio[..., None, :], b / ratio[..., :, None]
    return _Components(a.astype(dtype), b.astype(dtype), s[..., 0], largest)


def _covariance(stats: Any, matrix: jax.Array) -> jax.Array:
    """The Gram matrix over the number of examples; as it is where none were counted."""
    gram = stats.gram
    expected = (*matrix.shape[:-2], matrix.shape[-2], matrix.shape[-2])
    if gram.shape != expected:
        raise StatisticsError(
            f"the Gram matrix of the inputs has shape {gram.shape}, expected {expected}; capture with the same model "
            "and roles that the weight is adapted with."
        )
    return gram if stats.examples is None else gram / stats.examples[..., None, None]


def _warn_of_nothing(found: _Components, shape: tuple[int, ...]) -> None:
    """Warns of components that are too small to learn, where values are known."""
    try:
        nothing = bool(jnp.any(found.taken < NEGLIGIBLE * found.largest))
    except jax.errors.ConcretizationTypeError:
        return
    if nothing:
        warnings.warn(
            f"corda: in a weight of shape {shape} all trained components are below {NEGLIGIBLE} of the largest one, so "
            "the factors start at nearly zero and hardly learn. The weight's rank is deficient; choose a larger rank, "
            'or mode="instruction_previewed".',
            stacklevel=2,
        )


def _times(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)


register(
    __name__,
    title="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware "
    "Parameter-Efficient Fine-tuning",
    authors="Yang et al.",
    year=2024,
    kinds=("weight",),
    use_for="Forgetting less while learning, or starting from what a few batches of your task say about the inputs.",
    not_for="No batches are at hand before training, or the rates are tuned anyway: then it ends as PiSSA does.",
    differs=(
        'The covariance is that of captured Grams; capture it with `scale_examples="max_abs"` for the published one.'
    ),
)
