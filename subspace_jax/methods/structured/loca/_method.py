"""`loca`: draws the locations at which coefficients start."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from subspace_jax.core import (
    Method,
    Params,
    Role,
    check_choice,
    check_number,
    check_probability,
    check_rank,
    require_matrix,
)
from subspace_jax.methods.structured.loca._weight import CosineSpectrum, Evaluation
from subspace_jax.weights import hidden_zeros, map_weights


def loca(
    count: int,
    *,
    alpha: float = 1.0,
    evaluation: Evaluation = "auto",
    dropout: float = 0.0,
    highest: float = 0.999,
) -> Method:
    r"""Trains a few cosine coefficients of a weight's change, and their locations in the spectrum.

    \(W + \alpha\,C_{in}^T S\,C_{out}\) with orthonormal cosine transforms \(C\) and a spectrum \(S\) of `count`
    coefficients \(a\), zero at the start, at places \(l = \mathrm{round}(u (d - 1))\), uniform at the start. Those that
    share a place add up. Places learn by central differences over neighboring cells.

    Few values are not few operations: locations learn from the spectrum of the whole gradient. For n rows and a kernel
    of \(K = d_{in} d_{out}\) entries a step has 6 n K operations with the formed weight, where LoRA's has 4 n K, and
    \(4 K (d_{in} + d_{out})\) of the two transforms, which do not grow with n; on one device, where they are folded,
    about a third of it. As compiled for all kernels of MiniLM, 512 rows: 2.4 times LoRA's step; by that formula 1.6
    times at 4096 rows.

    Args:
      count: \(n\), number of coefficients of every matrix.
      alpha: \(\alpha\).
      evaluation: how the weight is used; see `CosineSpectrum`.
      dropout: probability of dropping an input of the cosine terms; see `with_dropout`.
      highest: locations end here. The published 0.999 leaves out the last frequencies of more than 500; 1.0 has all.

    Returns:
      A method whose weights are `CosineSpectrum`, with `coefficients` `[*stack, count]` and `locations`
      `[*stack, 2, count]` that learn. Published counts are of the coefficients alone: see `cosine_values`.

    Raises:
      RankError: `count` is not a positive integer.
      ValueError: another option is out of its range.

    Warning:
      Train with `alternating`, which gives coefficients and locations their turns; a location learns nothing while its
      coefficient is zero. Gradients of locations look one cell far: they follow a smooth spectrum, and do not find
      isolated peaks. Under a model-parallel mesh prefer `evaluation="sparse"`.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((8, 6))}, {"w": sj.loca(5)}, key=jax.random.key(0))
      >>> adapted["w"].coefficients.shape, adapted["w"].locations.shape
      ((5,), (2, 5))
      >>> bool((sj.merge(adapted)["w"] == 1.0).all())
      True
    """
    count = check_rank(count, what="loca: count")
    check_number("loca: alpha", alpha, above=0.0)
    check_choice("loca: evaluation", evaluation, get_args(Evaluation))
    check_probability("loca: dropout", dropout)
    check_number("loca: highest", highest, above=0.0, most=1.0)

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> CosineSpectrum:
        del stats
        require_matrix(array, role)
        stack = role.stack_shape(array.shape)
        return CosineSpectrum(
            base=array,
            coefficients=hidden_zeros(key, (*stack, count)),
            locations=jax.random.uniform(key, (*stack, 2, count), jnp.float32),
            scale=alpha,
            highest=highest,
            evaluation=evaluation,
            dropout=dropout,
            role=role,
            dtype=array.dtype,
            trainable=("coefficients", "locations"),
        )

    return Method("loca", make)


class CosineValues(NamedTuple):
    """Numbers of trained values of LoCA.

    Attributes:
      coefficients: the coefficients, which is the published count.
      with_locations: the coefficients and the locations that still learn.
    """

    coefficients: int
    with_locations: int


def cosine_values(adapted: Params) -> CosineValues:
    """Counts the values that LoCA trains, with and without the locations.

    Args:
      adapted: an adapted tree; arrays may be abstract.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((8, 6))}, {"w": sj.loca(5)}, key=jax.random.key(0))
      >>> fixed = sj.methods.loca.fix_locations(adapted)
      >>> tuple(sj.methods.loca.cosine_values(adapted)), tuple(sj.methods.loca.cosine_values(fixed))
      ((5, 15), (5, 5))
    """
    coefficients = locations = 0

    def count(path: str, weight: CosineSpectrum) -> CosineSpectrum:
        nonlocal coefficients, locations
        del path
        coefficients += weight.coefficients.size
        locations += 0 if weight.locations is None else weight.locations.size
        return weight

    map_weights(CosineSpectrum, count, adapted)
    return CosineValues(coefficients, coefficients + locations)


def fix_locations(adapted: Params) -> Params:
    """Rounds LoCA's locations to integers for good; from then on only coefficients learn.

    For the part of training after `alternating`'s cut-off, and for files: a coefficient and two integers each.

    Args:
      adapted: the whole adapted tree.

    Returns:
      A tree that stands for the same arrays, to `partition` anew.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((8, 6))}, {"w": sj.loca(5)}, key=jax.random.key(0))
      >>> adapted = sj.methods.loca.fix_locations(adapted)
      >>> adapted["w"].positions.dtype.name, adapted["w"].trainable
      ('int32', ('coefficients',))
    """

    def fix(path: str, weight: CosineSpectrum) -> CosineSpectrum:
        del path
        trainable = tuple(n for n in weight.trainable if n != "locations")
        return dataclasses.replace(weight, positions=weight.cells(), locations=None, trainable=trainable)

    return map_weights(CosineSpectrum, fix, adapted)
