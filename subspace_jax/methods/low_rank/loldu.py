"""LoLDU: trains the pivots of a weight's LDU factorization."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from subspace_jax.core import Method, Role, check_choice, check_number, check_rank, register, require_matrix
from subspace_jax.linalg import whole_matrices, wide_dtype
from subspace_jax.weights import LowRankCore, Route, feature_place, hidden_zeros

__all__ = [
    "loldu",
]


Start = Literal["ldu", "uniform", "constant", "normal", "ones", "zeros", "s_uniform", "s_normal"]
Residual = Literal["exact", "ldu"]
ConvolutionOrder = Literal["window_channels", "channels_window"]

# The published alpha, which counts where the rank is below the smaller side and nothing else was said.
PUBLISHED_ALPHA = 8.0
# A pivot below this share of the largest entry of the upper factor is taken for zero.
SMALLEST_PIVOT = 1e-6


def loldu(
    rank: int | None = None,
    *,
    alpha: float | None = None,
    sigma: float | None = None,
    start: Start = "ldu",
    residual: Residual = "exact",
    convolution_order: ConvolutionOrder = "window_channels",
    route: Route = "auto",
    residual_dtype: Any = None,
) -> Method:
    r"""Trains the diagonal of a lower-diagonal-upper factorization of a weight between its frozen triangles.

    With partial pivoting \(W^T = P L D U\), \(X = U_{1:r}^T\) and \(Y = (P L_{:,1:r})^T\): the weight is
    \(W_{res} + \sigma\,X\,\mathrm{diag}(z)\,Y\) with \(W_{res} = W - \sigma\,X\,\mathrm{diag}(z_{start})\,Y\). The
    first \(r\) pivots in the order of elimination are taken, which is not that of size. Where a pivot is zero, it
    counts as one and its row of \(U\) keeps its length.

    Operations of a step are those of `svfit` of the same rank.

    Args:
      rank: \(r\), at most the weight's smaller side; that side if None.
      alpha: \(\sigma = \alpha / r\). The authors' code has 8 and, in its shortcuts, 1.
      sigma: \(\sigma\) itself. With neither, 1 where `rank` is the smaller side and 8 / `rank` elsewhere.
      start: of \(z\), with \(z_0\) the pivots, \(m\) their mean and \(d\) their standard deviation: "ldu" \(z_0\),
        "uniform" \(U(-|m|/2, |m|/2)\), "constant" \(m\), "normal" \(N(m, d^2)\), "ones", "zeros", "s_uniform"
        \(U(-1, 1)\), "s_normal" \(N(0, 1)\).
      residual: "exact" takes the start that was chosen out of \(W\), so that the model starts as it was. "ldu", as
        the authors' code does, always takes \(z_0\) out: any other start is then another model.
      convolution_order: order of the rows of a convolution kernel `[*window, channels, out]`. "window_channels" is
        that of the array; "channels_window" is that of the authors' code, and gives other factors.
      route: how the weight is used; see `LowRankCore`. In bfloat16 and float16 it is always formed: the triangles
        cancel, and multiplied in bfloat16 they lose 12 % of the output of a 768 x 768 normal matrix, not 0.2 %.
      residual_dtype: dtype of \(W_{res}\); that of the weight if None. Where all of \(W\) is in the factors, at full
        rank with \(\sigma = 1\), \(W_{res}\) is zero and kept only if a dtype is given.

    Returns:
      A method whose weights are `LowRankCore` with a diagonal core \(z\) `[*stack, rank]`, `left` \(X\)
      `[*stack, in, rank]` and `right` \(Y\) `[*stack, rank, out]`, in float32.

    Raises:
      RankError: `rank` is above the weight's smaller side; raised by `adapt`, with the path.
      ValueError: an unknown option, `alpha` or `sigma` that is not positive, or both of them.

    Warning:
      The step of the weight is \(\sigma\) times that of \(z\): with \(\sigma = 1 / r\) a learning rate is \(r\) times
      weaker. Pivots differ in size, and with them the gradients of \(z\), which Adam evens out and plain gradient
      descent does not. Weight decay would shrink the pretrained weight. The factors depend on the last bits of the
      machine's factorization: keep them with the adapter, as `save_adapter` does.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jax.random.normal(jax.random.key(1), (6, 4))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.loldu(rank=2, sigma=1.0)}, key=jax.random.key(0))
      >>> adapted["w"].core.shape, bool(jnp.allclose(sj.merge(adapted)["w"], w, atol=1e-5))
      ((2,), True)
    """
    if rank is not None:
        rank = check_rank(rank, what="loldu: rank")
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        if value is not None:
            check_number(f"loldu: {name}", value, above=0.0)
    if alpha is not None and sigma is not None:
        raise ValueError(f"loldu: alpha={alpha} and sigma={sigma} say the same twice; pass one of them.")
    for name, value, options in (
        ("start", start, get_args(Start)),
        ("residual", residual, get_args(Residual)),
        ("convolution_order", convolution_order, get_args(ConvolutionOrder)),
        ("route", route, get_args(Route)),
    ):
        check_choice(f"loldu: {name}", value, options)

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> LowRankCore:
        del stats
        require_matrix(array, role)
        smaller = min(role.sizes(array.shape))
        taken = smaller if rank is None else rank
        check_rank(taken, smaller)
        scale = _scale(taken, smaller, alpha, sigma)
        matrix = role.matrix(array).astype(wide_dtype(array.dtype))
        rows = _channels_first(role, array.shape) if convolution_order == "channels_window" else None
        factors = _factorize(matrix if rows is None else jnp.take(matrix, rows, axis=-2), rank=taken)
        left = factors.left if rows is None else jnp.take(factors.left, np.argsort(rows), axis=-2)
        core = _STARTS[start](key, factors.pivots)
        removed = (core if residual == "exact" else factors.pivots) * scale
        # All of the triangles give the weight itself, and nothing is left over.
        complete = taken == smaller and scale == 1.0 and (start == "ldu" or residual == "ldu")
        base = None
        if not complete or residual_dtype is not None:
            product = jnp.matmul(left * removed[..., None, :], factors.right, precision=lax.Precision.HIGHEST)
            base = role.unmatrix(matrix - product, array.shape).astype(residual_dtype or array.dtype)
        return LowRankCore(
            base=base,
            in_sizes=role.in_shape(array.shape),
            out_sizes=role.out_shape(array.shape),
            left=left,
            core=core,
            right=factors.right,
            scale=scale,
            route=route,
            wide_only=True,
            role=role,
            dtype=array.dtype,
            trainable=("core",),
        )

    return Method("loldu", make)


def _scale(rank: int, smaller: int, alpha: float | None, sigma: float | None) -> float:
    if sigma is not None:
        return float(sigma)
    if alpha is None and rank == smaller:
        return 1.0
    return (PUBLISHED_ALPHA if alpha is None else float(alpha)) / rank


class _Factors(NamedTuple):
    """The leading part of the factorization of `[*stack, in, out]`.

    Attributes:
      left: `[*stack, in, rank]`, unit lower trapezoidal.
      pivots: `[*stack, rank]`.
      right: `[*stack, rank, out]`, unit lower trapezoidal after transposing and undoing the permutation.
    """

    left: jax.Array
    pivots: jax.Array
    right: jax.Array


@functools.partial(jax.jit, static_argnames="rank")
def _factorize(matrix: jax.Array, *, rank: int) -> _Factors:
    """Partial pivoting on the transpose, so that the pivots are searched along the outputs."""
    packed, _, order = lax.linalg.lu(jnp.swapaxes(whole_matrices(matrix), -1, -2))
    upper = jnp.triu(packed[..., : min(packed.shape[-2:]), :])
    pivots = jnp.diagonal(upper, axis1=-2, axis2=-1)
    largest = jnp.max(jnp.abs(upper), axis=(-2, -1))
    pivots = jnp.where(jnp.abs(pivots) <= SMALLEST_PIVOT * largest[..., None], 1.0, pivots)[..., :rank]
    unit_upper = upper[..., :rank, :] / pivots[..., :, None]
    lower = jnp.tril(packed[..., :rank], -1) + jnp.eye(packed.shape[-2], rank, dtype=packed.dtype)
    # Row i of the triangle belongs to output order[i].
    lower = jnp.take_along_axis(lower, jnp.argsort(order, axis=-1)[..., None], axis=-2)
    return _Factors(jnp.swapaxes(unit_upper, -1, -2), pivots, jnp.swapaxes(lower, -1, -2))


def _channels_first(role: Role, shape: tuple[int, ...]) -> np.ndarray | None:
    """The rows of a convolution's matrix with the input features slowest, and then the window."""
    if role.kind != "conv":
        return None
    sizes = role.in_shape(shape)
    return np.moveaxis(np.arange(np.prod(sizes)).reshape(sizes), feature_place(role), 0).ravel()


def _mean(pivots: jax.Array) -> jax.Array:
    return jnp.mean(pivots, axis=-1, keepdims=True)


def _uniform(key: jax.Array, pivots: jax.Array) -> jax.Array:
    return jax.random.uniform(key, pivots.shape, pivots.dtype, -1.0, 1.0)


def _normal(key: jax.Array, pivots: jax.Array) -> jax.Array:
    return jax.random.normal(key, pivots.shape, pivots.dtype)


_STARTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "ldu": lambda key, pivots: pivots,
    "uniform": lambda key, pivots: 0.5 * jnp.abs(_mean(pivots)) * _uniform(key, pivots),
    "constant": lambda key, pivots: jnp.broadcast_to(_mean(pivots), pivots.shape),
    "normal": lambda key, pivots: _mean(pivots) + jnp.std(pivots, axis=-1, keepdims=True) * _normal(key, pivots),
    "ones": lambda key, pivots: jnp.ones_like(pivots),
    "zeros": lambda key, pivots: hidden_zeros(key, pivots.shape, pivots.dtype),
    "s_uniform": _uniform,
    "s_normal": _normal,
}

register(
    __name__,
    title="LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning",
    authors="Shi et al.",
    year=2024,
    kinds=("weight",),
    use_for="A few values for each matrix where a decomposition must be cheap.",
    not_for="Files must be small: the frozen factors are large to save. LoRA of rank 8 learns far more.",
    differs=(
        "The start is the pretrained model whatever the pivots start at; the authors' code always takes the same "
        'part out (`residual="ldu"`). A pivot of zero counts as one.'
    ),
)
