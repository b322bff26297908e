"""PiSSA and QPiSSA: train the principal singular part of a weight and freeze the rest."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import (
    Full,
    Method,
    Params,
    Role,
    StructureError,
    Weight,
    check_choice,
    check_dtype,
    check_int,
    check_rank,
    is_weight,
    map_with_paths,
    nested_weights,
    register,
    require_matrix,
)
from subspace_jax.linalg import randomized_svd, truncated_svd, wide_dtype
from subspace_jax.weights import LowRank, lora_scale, map_weights, original_arrays, quantize_nf4

__all__ = [
    "pissa",
    "qpissa",
    "to_lora",
]


SVDMode = Literal["randomized", "exact"]


def pissa(
    rank: int,
    *,
    alpha: float | None = None,
    svd: SVDMode = "randomized",
    iterations: int = 4,
    oversample: int = 8,
    residual_dtype: Any = None,
    dtype: Any = jnp.float32,
) -> Method:
    r"""Trains the principal singular part of a weight and freezes the rest.

    With \(W = U S V^T\) and \(s = \alpha / r\): \(a = U_r \sqrt{S_r / s}\), \(b = \sqrt{S_r / s}\,V_r^T\), and the
    frozen residual is \(W - s\,a\,b\), subtracted in float32 from the factors as they are stored, so that the adapted
    weight equals \(W\) at the start.

    Args:
      rank: \(r\), at most the weight's smaller side.
      alpha: \(\alpha\); `rank` if None, so that \(s = 1\).
      svd: "randomized" finds the leading part by power iterations, "exact" by a full decomposition.
      iterations: power iterations of the randomized decomposition.
      oversample: its extra columns.
      residual_dtype: dtype of the frozen residual; that of the weight if None. A bfloat16 residual rounds by up to
        one unit in its last place; `merge_rounding` tells by how much.
      dtype: dtype of the factors.

    Returns:
      A method whose weights are `LowRank` with a residual base.

    Raises:
      RankError: `rank` is above the weight's smaller side; raised by `adapt`, with the path.
      ValueError: an option is out of its range, or `dtype` is float16.

    Warning:
      There is no dropout, and weight decay would shrink the weight itself: the factors carry pretrained values.
      Where the rank of the weight is below `rank`, the spare columns are zero on both sides and stay so; `adapt` warns.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jax.random.normal(jax.random.key(1), (6, 4))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.pissa(rank=2)}, key=jax.random.key(0))
      >>> bool(jnp.allclose(sj.merge(adapted)["w"], w, atol=1e-5))
      True
    """
    options = _checked("pissa", rank, svd, iterations, oversample, dtype)
    rank = options["rank"]
    scale = lora_scale(rank, alpha, what="pissa: alpha")

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> LowRank:
        del stats
        require_matrix(array, role)
        check_rank(rank, min(role.sizes(array.shape)))
        matrix = role.matrix(array).astype(wide_dtype(array.dtype))
        a, b = _principal(key, matrix, scale=scale, **options)
        _warn_of_idle("pissa", a, array.shape)
        residual = _residual(array, a, b, role, scale, residual_dtype or array.dtype)
        return _low_rank(residual, a, b, scale, array, role)

    return Method("pissa", make)


def qpissa(
    rank: int,
    *,
    steps: int = 5,
    svd: SVDMode = "randomized",
    iterations: int = 4,
    oversample: int = 8,
    order: Literal["out_in", "in_out"] = "out_in",
    dtype: Any = jnp.float32,
) -> Method:
    r"""Trains the principal part of a weight over a base in 4 bits, and makes up for part of the quantization error.

    From \(E_0 = W\), for \(t = 1 \dots T\): \((a_t, b_t)\) are the principal factors of \(E_{t-1}\), \(Q_t\) is the
    quantized \(W - a_t b_t\), and \(E_t = W - Q_t\). The base is \(Q_T\) in NF4, dequantized where it is used.

    Args:
      rank: \(r\), at most the weight's smaller side.
      steps: \(T\); 1 quantizes the residual of PiSSA once.
      svd: "randomized" finds the leading part by power iterations, "exact" by a full decomposition.
      iterations: power iterations of the randomized decomposition.
      oversample: its extra columns.
      order: order of consecutive entries in a block; see `NF4`.
      dtype: dtype of the factors.

    Returns:
      A method whose weights are `LowRank` with an `NF4` base.

    Raises:
      RankError: `rank` is above the weight's smaller side; raised by `adapt`, with the path.
      ValueError: `steps` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jax.random.normal(jax.random.key(1), (64, 64))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.qpissa(rank=8)}, key=jax.random.key(0))
      >>> adapted["w"].base.codes.dtype.name, adapted["w"].base.codes.nbytes
      ('uint8', 2048)
    """
    options = _checked("qpissa", rank, svd, iterations, oversample, dtype)
    rank, steps = options["rank"], check_int("qpissa: steps", steps)
    check_choice("qpissa: order", order, ("out_in", "in_out"))

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> LowRank:
        del stats
        require_matrix(array, role)
        check_rank(rank, min(role.sizes(array.shape)))
        matrix = role.matrix(array).astype(wide_dtype(array.dtype))

        def quantized(a: jax.Array, b: jax.Array):
            residual = _residual(array, a, b, role, 1.0, matrix.dtype)
            return dataclasses.replace(quantize_nf4(residual, role, order), dtype=array.dtype)

        left = matrix
        for step_key in jax.random.split(key, steps):
            a, b = _principal(step_key, left, scale=1.0, **options)
            base = quantized(a, b)
            left = matrix - role.matrix(base.materialize(matrix.dtype))
        _warn_of_idle("qpissa", a, array.shape)
        return dataclasses.replace(_low_rank(base, a, b, 1.0, array, role), start_a=None, start_b=None)

    return Method("qpissa", make)


def to_lora(adapted: Params, params: Params) -> Params:
    r"""Rewrites residual low-rank weights as plain LoRA on the untouched arrays.

    With the factors at the start \(a_0, b_0\): \(s (a b - a_0 b_0) = s\,[a\,|\,a_0]\,[b; -b_0]\), a LoRA of twice the
    rank at the same scale (an exported alpha doubles with the rank).

    Args:
      adapted: a tree with weights from `pissa` or `corda`, also inside `dora`. Those of plain LoRA stay as they are, as
        do ordinary arrays.
      params: the tree that `adapt` was given.

    Returns:
      The tree with the original arrays as bases.

    Raises:
      StructureError: a path of `adapted` is not in `params` with the same shape, or a weight is no low-rank addition
        to the original array: of another method, or over a quantized or adapted base.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"w": jax.random.normal(jax.random.key(1), (6, 4))}
      >>> adapted = sj.adapt(params, {"w": sj.pissa(rank=2)}, key=jax.random.key(0))
      >>> sj.to_lora(adapted, params)["w"].a.shape
      (6, 4)
    """
    originals = original_arrays(params)

    def convert(path: str, weight: LowRank) -> LowRank:
        if isinstance(weight.base, Weight):
            raise StructureError(
                f"{path}: to_lora: the {weight.method or 'LowRank'} stands on a {type(weight.base).__name__}, not on "
                f"the original array, from which it cannot be told. {_MEND}"
            )
        if weight.start_a is None or weight.start_b is None:
            return weight
        a, b = weight.original_factors()
        return dataclasses.replace(
            weight,
            base=originals(path, weight),
            a=a,
            b=b,
            start_a=None,
            start_b=None,
            base_squares=None,
            method="lora",
        )

    def check(path: str, leaf: Any) -> Any:
        if not is_weight(leaf) or isinstance(leaf, Full):
            return leaf
        if not any(isinstance(w, LowRank) for w in nested_weights(leaf).values()):
            raise StructureError(
                f"{path}: to_lora: a {type(leaf).__name__} of {leaf.method!r} is no low-rank addition to the original "
                f"array. {_MEND}"
            )
        return leaf

    return map_weights(LowRank, convert, map_with_paths(check, adapted))


_MEND = "Convert the other weights alone, by a tree without this one, or merge() it."


# One compiled program per shape and setting, whichever call of `pissa` it comes from.
@functools.partial(jax.jit, static_argnames=("rank", "scale", "svd", "iterations", "oversample", "dtype"))
def _principal(
    key: jax.Array, matrix: jax.Array, *, rank: int, scale: float, svd: SVDMode, iterations: int, oversample: int, dtype
) -> tuple[jax.Array, jax.Array]:
    """Factors of `[*stack, in, out]` whose scaled product is the best of this rank."""
    if svd == "exact":
        u, s, vt = truncated_svd(matrix, rank)
    else:
        u, s, vt = randomized_svd(key, matrix, rank, iterations=iterations, oversample=oversample)
    root = jnp.sqrt(s / scale)
    return (u * root[..., None, :]).astype(dtype), (root[..., :, None] * vt).astype(dtype)


def _checked(name: str, rank: Any, svd: Any, iterations: Any, oversample: Any, dtype: Any) -> dict[str, Any]:
    """The options of the decomposition, as `_principal` takes them."""
    check_choice(f"{name}: svd", svd, ("randomized", "exact"))
    return {
        "rank": check_rank(rank, what=f"{name}: rank"),
        "svd": svd,
        "iterations": check_int(f"{name}: iterations", iterations, least=0),
        "oversample": check_int(f"{name}: oversample", oversample, least=0),
        "dtype": check_dtype(f"{name}: dtype", dtype),
    }


def _warn_of_idle(name: str, a: jax.Array, shape: tuple[int, ...]) -> None:
    """Warns of columns that start at zero on both sides and never learn, where values are known."""
    try:
        least = int(_least_live(a))
    except jax.errors.ConcretizationTypeError:
        return
    if least < a.shape[-1]:
        warnings.warn(
            f"{name}: a weight of shape {shape} has a matrix of rank {least}, below rank={a.shape[-1]}; the other "
            f"{a.shape[-1] - least} columns start at nearly zero on both sides and hardly learn. Choose rank={least} "
            "or less for it, or lora().",
            stacklevel=2,
        )


@jax.jit
def _least_live(a: jax.Array) -> jax.Array:
    """The fewest columns that any matrix of a stack has above rounding."""
    norms = jnp.linalg.norm(a.astype(jnp.float32), axis=-2)
    # Values below rounding are those of zero; a column holds the root of its value.
    live = norms**2 > a.shape[-2] * jnp.finfo(jnp.float32).eps * jnp.max(norms**2, axis=-1, keepdims=True)
    return jnp.min(jnp.sum(live, axis=-1))


# Outside of a trace this is one program, inside a part of the one that is traced.
@functools.partial(jax.jit, static_argnames=("role", "scale", "dtype"), inline=True)
def _residual(array: jax.Array, a: jax.Array, b: jax.Array, role: Role, scale: float, dtype: Any) -> jax.Array:
    """What the scaled product of the factors, as they are stored, leaves of an array; in float32 throughout."""
    wide = wide_dtype(a.dtype)
    product = scale * jnp.matmul(a.astype(wide), b.astype(wide), precision=jax.lax.Precision.HIGHEST)
    return role.unmatrix(role.matrix(array).astype(wide_dtype(array.dtype)) - product, array.shape).astype(dtype)


def _low_rank(base: Any, a: jax.Array, b: jax.Array, scale: float, array: jax.Array, role: Role) -> LowRank:
    return LowRank(
        base=base,
        a=a,
        b=b,
        # Copies: a donated step would otherwise hand the same buffer in twice.
        start_a=jnp.copy(a),
        start_b=jnp.copy(b),
        scale=scale,
        role=role,
        dtype=array.dtype,
        trainable=("a", "b"),
    )


register(
    __name__,
    title="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    authors="Meng, Wang, Zhang",
    year=2024,
    kinds=("weight",),
    use_for="Fast first steps at one small rate, and a 4-bit base whose error is partly made up for (`qpissa`).",
    not_for="Rates are tuned, where LoRA ends level; or a rate of LoRA's is copied, which is up to ten times too high.",
    differs=(
        "The residual is subtracted from the factors as they are stored, so that the start is exact in bfloat16 too."
    ),
)
