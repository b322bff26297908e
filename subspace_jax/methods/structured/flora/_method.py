"""`flora` and its LoRA form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from subspace_jax.core import (
    Method,
    RankError,
    Role,
    check_choice,
    check_dtype,
    check_number,
    check_probability,
    check_rank,
    require_matrix,
)
from subspace_jax.methods.structured.flora._weight import Tucker
from subspace_jax.methods.structured.flora._weight import tucker_in_factors as in_factors
from subspace_jax.weights import LowRank, feature_place, hidden_zeros

FactorInit = Literal["kaiming_r", "normal_0.02", "kaiming_fan_in"]

# The published factor for convolutions; dense kernels have alpha / r, which is 1 where alpha is r.
CONVOLUTION_SCALE = 4.0


def flora(
    rank: int,
    *,
    out_rank: int | None = None,
    window_ranks: int | Sequence[int] = 2,
    scale: float | None = None,
    dropout: float = 0.0,
    factor_init: FactorInit = "kaiming_r",
    vectors: bool = False,
    dtype: Any = jnp.float32,
) -> Method:
    r"""Trains a small core tensor that a factor expands along every axis of a kernel, which is never flattened.

    \(W + s\,G \times_1 U_1 \cdots \times_N U_N\) with \(G = 0\) at the start. For a dense kernel that is
    \(W + s\,U_{in} G U_{out}^T\), with the axes of several heads taken together; a convolution has one factor for each
    axis of its window, one for its input and one for its output features.

    Args:
      rank: of the input features.
      out_rank: of the output features; `rank` if None.
      window_ranks: of the axes of a convolution's window, one for all, cut off at the size of each axis, or one for
        each, at most its size.
      scale: \(s\), not divided by any rank; 4 for convolutions and 1 for other kernels if None, as published.
      dropout: probability of dropping an input of the factors in training; see `with_dropout`.
      factor_init: entries of every \(U_i\) of size \(d_i \times r_i\): "kaiming_r" draws from \(N(0, 1 / (2 r_i))\),
        "normal_0.02" from \(N(0, 0.02^2)\), "kaiming_fan_in" from \(U(-1/\sqrt{d_i}, 1/\sqrt{d_i})\).
      vectors: serve biases and scales as well, as \(b + s\,U G\); otherwise they are refused.
      dtype: dtype of core and factors.

    Returns:
      A method whose weights are `Tucker`, with \(\prod_i r_i + \sum_i d_i r_i\) values that learn.

    Raises:
      RankError: a rank is not a positive integer, or `window_ranks` are not one for each axis of the window or above
        it; raised by `adapt`, with the path, where it depends on the kernel.
      ValueError: `scale` is not a finite number, `dropout` is not in [0, 1), `factor_init` is none of those, or `dtype`
        is float16.

    Note:
      The input features of a convolution kernel are its last axis but the output features, as in Flax
      `[*window, in, out]`, or the axis after them in a kernel `[out, in, *window]` (OIHW). Other orders are refused.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params, roles = {"kernel": jnp.ones((3, 3, 8, 16))}, {"kernel": sj.Role.conv()}
      >>> adapted = sj.adapt(params, {"kernel": sj.flora(4)}, key=jax.random.key(0), roles=roles)
      >>> adapted["kernel"].core.shape, sj.summary(adapted).trainable
      ((2, 2, 4, 4), 172)
    """
    rank = check_rank(rank, what="flora: rank")
    out_rank = rank if out_rank is None else check_rank(out_rank, what="flora: out_rank")
    for_each = isinstance(window_ranks, Sequence)
    listed: Sequence[Any] = window_ranks if isinstance(window_ranks, Sequence) else (window_ranks,)
    given = tuple(check_rank(r, what="flora: window_ranks") for r in listed)
    if scale is not None:
        check_number("flora: scale", scale)
    check_probability("flora: dropout", dropout)
    check_choice("flora: factor_init", factor_init, get_args(FactorInit))
    dtype = check_dtype("flora: dtype", dtype)

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Tucker:
        del stats
        if vectors and not role.is_matrix and array.ndim == len(role.stack_axes) + 1:
            axis = next(i for i in range(array.ndim) if i not in role.stack_axes)
            role = dataclasses.replace(role, in_axes=(), out_axes=(axis,))
            sizes, ranks = [], []
        else:
            require_matrix(array, role)
            sizes = list(role.in_shape(array.shape)) if role.kind == "conv" else [role.sizes(array.shape)[0]]
            place = feature_place(role) if role.kind == "conv" else 0
            ranks = _window_ranks(given if for_each else given[0], [*sizes[:place], *sizes[place + 1 :]])
            ranks.insert(place, rank)
        sizes.append(role.sizes(array.shape)[1])
        ranks.append(out_rank)
        stack = role.stack_shape(array.shape)
        keys = jax.random.split(key, len(sizes))
        factors = [
            _draw(k, (*stack, d, r), factor_init).astype(dtype) for k, d, r in zip(keys, sizes, ranks, strict=True)
        ]
        inputs: dict[str, Any] = in_factors(factors[:-1])
        return Tucker(
            base=array,
            core=hidden_zeros(key, (*stack, *ranks), dtype),
            **inputs,
            out=jnp.swapaxes(factors[-1], -1, -2),
            scale=scale if scale is not None else CONVOLUTION_SCALE if role.kind == "conv" else 1.0,
            dropout=dropout,
            role=role,
            dtype=array.dtype,
            trainable=("core", *inputs, "out"),
        )

    return Method("flora", make)


def _window_ranks(given: int | tuple[int, ...], window: Sequence[int]) -> list[int]:
    """One rank for each axis of the window, at most its size."""
    if isinstance(given, int):
        return [min(given, size) for size in window]
    if window and (len(given) != len(window) or any(r > size for r, size in zip(given, window, strict=True))):
        raise RankError(
            f"window_ranks={given} for a window of {len(window)} axes {tuple(window)}; give one for each, at most its "
            "size, or an int, which is cut off at each size."
        )
    return list(given[: len(window)])


def _draw(key: jax.Array, shape: tuple[int, ...], factor_init: FactorInit) -> jax.Array:
    """A factor `[*stack, size, rank]`; drawn in float32, so that the same key gives the same in every dtype."""
    if factor_init == "kaiming_fan_in":
        bound = 1.0 / math.sqrt(shape[-2])
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    width = 0.02 if factor_init == "normal_0.02" else 1.0 / math.sqrt(2 * shape[-1])
    return width * jax.random.normal(key, shape, jnp.float32)


def to_lora(weight: Tucker) -> LowRank:
    r"""Returns a dense FLoRA weight as LoRA: \(a = U_{in} G\), \(b = U_{out}^T\), with the same scale.

    Args:
      weight: a `Tucker` weight with one input factor.

    Raises:
      RankError: it has another number of factors, as a convolution's or a vector's.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.flora(2)}, key=jax.random.key(0))
      >>> sj.methods.flora.to_lora(adapted["w"]).a.shape
      (6, 2)
    """
    if len(weight.in_factors) != 1:
        raise RankError(
            f"flora.to_lora: a weight of shape {weight.shape} with {len(weight.in_factors)} input factors is no "
            "product of two matrices; merge() it, or keep it as it is."
        )
    (into,) = weight.in_factors
    return LowRank(
        base=weight.base,
        a=jnp.matmul(into, weight.core, precision=jax.lax.Precision.HIGHEST),
        b=weight.out,
        scale=weight.scale,
        dropout=weight.dropout,
        role=weight.role,
        dtype=weight.dtype,
        trainable=("a", "b"),
        method=weight.method,
    )
