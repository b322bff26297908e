"""The penalty that keeps a group's additions orthogonal to the weight and to each other."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from subspace_jax.core import Params, StructureError, Weight, check_choice
from subspace_jax.linalg import wide_matmul
from subspace_jax.methods.low_rank.pego._weight import GroupLowRank
from subspace_jax.weights import map_weights

Norm = Literal["l1", "fro2"]
Axis = Literal["in", "out"]


class PegoTerms(NamedTuple):
    r"""The two terms of the penalty, float32 scalars.

    Attributes:
      preserve: \(\sum_i |W^T \delta_i|\), over all weights.
      diversify: \(\sum_{i < j} |\delta_i^T \delta_j|\), likewise.
    """

    preserve: jax.Array
    diversify: jax.Array


def penalty(adapted: Params, *, norm: Norm = "l1", axis: Axis = "in", normalize: bool = False) -> jax.Array:
    r"""Returns how far the groups of a tree are from orthogonal, which PEGO adds to the loss, times 1e-3.

    \(\sum_i |W^T \delta_i| + \sum_{i<j} |\delta_i^T \delta_j|\), summed over weights and layers, with \(|M|\) the sum
    of absolute entries, not their mean. It is zero where all columns of the additions \(\delta_i = A_i B_i\) are
    orthogonal to those of \(W\) and of each other. Where \(W\) has full rank \(d_{in}\) the first term vanishes for
    \(\delta_i = 0\) alone, and is a soft shrinkage by its spectrum.

    It grows with the width and the number of weights: choose its factor anew for another model, or `normalize`.

    Args:
      adapted: a tree with weights of `pego`; in a loss what `combine` returns. \(W\) gets no gradient.
      norm: "l1", or "fro2" for squared Frobenius norms, of which no product of the weight's size is formed.
      axis: "in" as published and run, or "out" for \(|W \delta_i^T|\) and \(|\delta_i \delta_j^T|\), which stands
        disabled in the authors' code.
      normalize: divide each weight's term by the number of entries of its products, and by the number of matrices.

    Returns:
      A float32 scalar; at the start it and its gradient are zero.

    Raises:
      StructureError: the tree has no weight of `pego`.
      ValueError: `norm` or `axis` is unknown.

    Note:
      A step of `pego(2, modules=4)` in the benchmark's transformer, with 512 tokens, has 1.11 times the products of
      LoRA's with as many values on all kernels, and 1.01 times on query and value as published; the penalty costs the
      same for any number of tokens. One product of outputs by outputs is in memory at a time, forward and backward.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.eye(3)}, {"w": sj.methods.pego.pego(1, modules=2)}, key=jax.random.key(0))
      >>> a = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
      >>> one = {"w": dataclasses.replace(adapted["w"], a=a, b=jnp.eye(3)[:2])}
      >>> sj.methods.pego.penalty_terms(one)
      PegoTerms(preserve=Array(3., dtype=float32), diversify=Array(0., dtype=float32))
    """
    return sum(penalty_terms(adapted, norm=norm, axis=axis, normalize=normalize), jnp.zeros(()))


def penalty_terms(adapted: Params, *, norm: Norm = "l1", axis: Axis = "in", normalize: bool = False) -> PegoTerms:
    """Returns the two terms of `penalty` apart, to be reported or weighted.

    Args:
      adapted: as in `penalty`.
      norm: likewise.
      axis: likewise.
      normalize: likewise.

    Returns:
      Both terms, float32 scalars.

    Raises:
      StructureError: the tree has no weight of `pego`.
      ValueError: `norm` or `axis` is unknown.
    """
    check_choice("penalty: norm", norm, get_args(Norm))
    check_choice("penalty: axis", axis, get_args(Axis))
    found: list[GroupLowRank] = []
    map_weights(GroupLowRank, lambda _, weight: (found.append(weight), weight)[1], adapted)
    if not found:
        raise StructureError(
            "pego.penalty: the tree has no weight of pego. Give the adapted tree, or inside a loss what "
            "combine(trainable, frozen) returns."
        )
    matrices = sum(int(np.prod(weight.a.shape[:-2])) for weight in found)
    preserve = diversify = jnp.zeros((), jnp.float32)
    for weight in found:
        terms = _of_weight(weight, norm, axis)
        size = float(weight.role.sizes(weight.shape)[1 if axis == "in" else 0] ** 2 * matrices) if normalize else 1.0
        preserve, diversify = preserve + jnp.sum(terms[0]) / size, diversify + jnp.sum(terms[1]) / size
    return PegoTerms(preserve, diversify)


@functools.partial(
    jax.jit,
    static_argnames=(
        "norm",
        "axis",
    ),
    inline=True,
)
def _of_weight(weight: GroupLowRank, norm: Norm, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """The terms of one weight, `[N]` and `[N (N - 1) / 2]`, summed over its layers."""
    base = weight.base.materialize(jnp.float32) if isinstance(weight.base, Weight) else weight.base
    kernel = weight.role.matrix(lax.stop_gradient(base)).astype(jnp.float32)
    a, b = (v.astype(jnp.float32) for v in weight.groups())
    a = a * weight.scale.astype(jnp.float32)
    # Inner products run over the inputs for "in"; for "out" everything is transposed.
    inner, outer = (a, b) if axis == "in" else (_transposed(b), _transposed(a))
    kernel = kernel if axis == "in" else _transposed(kernel)
    pairs = np.triu_indices(weight.modules, 1)
    left = wide_matmul(_transposed(kernel)[..., None, :, :], inner)
    between = wide_matmul(_transposed(inner[..., pairs[0], :, :]), inner[..., pairs[1], :, :])
    crossed = wide_matmul(_transposed(outer[..., pairs[0], :, :]), between)
    lefts = jnp.concatenate([left, crossed], axis=-3)
    rights = jnp.concatenate([outer, outer[..., pairs[1], :, :]], axis=-3)
    count = lefts.shape[-3]
    if norm == "fro2":
        grams = wide_matmul(_transposed(lefts), lefts) * wide_matmul(rights, _transposed(rights))
        sums = jnp.sum(grams, axis=(-2, -1)).reshape(-1, count)
    else:
        flat = lefts.reshape(-1, *lefts.shape[-2:]), rights.reshape(-1, *rights.shape[-2:])
        # One product at a time, made again in the backward pass.
        sums = lax.map(jax.checkpoint(_absolute), flat).reshape(-1, count)
    total = jnp.sum(sums, axis=0)
    return total[: weight.modules], total[weight.modules :]


def _absolute(factors: tuple[jax.Array, jax.Array]) -> jax.Array:
    product = wide_matmul(*factors)
    # By the sign: the derivative of `jnp.abs` is 1 at zero, where every fresh group stands, and this one's is 0.
    return jnp.sum(product * lax.stop_gradient(jnp.sign(product)))


def _transposed(array: jax.Array) -> jax.Array:
    return jnp.swapaxes(array, -1, -2)
