"""`snell`: starts the factors of a kernel, and writes what they make as single entries."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import (
    Method,
    Params,
    RankError,
    Role,
    check_choice,
    check_dtype,
    check_int,
    check_number,
    check_probability,
    check_rank,
    require_matrix,
)
from subspace_jax.methods.sparse.snell._kernels import Kernel, Rule, threshold_order
from subspace_jax.methods.sparse.snell._weight import KernelSparse
from subspace_jax.weights import SparseDelta, map_weights, positions_of


def snell(
    rank: int,
    *,
    sparsity: float,
    kernel: Kernel = "distance",
    rule: Rule = "soft",
    pieces: int = 2,
    dropout: float = 0.1,
    drop_path: float = 0.1,
    dtype: Any = jnp.float32,
) -> Method:
    r"""Trains two factors whose kernel matrix, after a competition of its entries, is added to a weight.

    \(D_{ij} = \sum_p c_p \|A_{p,i} - B_{p,j}\|\) with \(c_p = 0.1\,(-1)^p\), whose rank the factors' width does not
    bound, and \(\Delta W = D\,(|D| - t)_+\) with \(t\) the \(\lceil s S \rceil\)-th smallest of all \(|D|\), found anew
    at every use. The magnitude is held fixed in differentiation: entries below the threshold have no gradient of their
    own, and come back because others share their rows. No mask and no matrix is stored.

    Published: all linear layers of the blocks, AdamW at 1e-3 with decay 1e-4, cosine; head and class token learn too.

    Args:
      rank: \(r\), the width of both factors over all pieces: 8, 16 or 32.
      sparsity: \(s\) in [0, 1], the share of entries that is zero. 0 leaves the competition and the magnitude out and
        adds \(D\) itself ("KLoRA"), which is no limit of small \(s\). Tuned by task, 0 to 0.995.
      kernel: "distance"; or "linear" \(x \cdot x'\), "sigmoid" \(\alpha / (1 + e^{-\beta x \cdot x'}) + \gamma\), "rbf"
        \(\alpha e^{-\beta \|x - x'\|^2} + \gamma\), whose scalars learn and start at 1, 1 and 0.
      rule: "soft", as in the paper; "hard", as released: \(D\,|D|\) where \(|D|\) is above the \(s\)-quantile.
      pieces: \(P\), a divisor of the rank.
      dropout: of the addition's inputs, where `with_dropout` gives keys; not on the attention's projection in the
        release, which a rule of its own says.
      drop_path: of the addition, for whole examples, likewise.
      dtype: of the factors.

    Returns:
      A method whose weights are `KernelSparse` with `a` `[*stack, pieces, in, rank / pieces]` and `b` likewise of
      `out`: \(r (d_{in} + d_{out})\) values. Stacked layers compete each for themselves; a convolution is the matrix of
      its window and input features by its outputs.

    Raises:
      RankError: `pieces` does not divide `rank`.
      ValueError: an option is out of range.

    Note:
      The addition is not zero at the start: for 768 x 768 and rank 32 its entries have a deviation of 7e-7 (6e-4
      without competition). That is published. In one place the paper calls the share that stays \(s\); here it is what
      its equation and the code say.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> method = sj.methods.snell.snell(4, sparsity=0.9)
      >>> adapted = sj.adapt({"w": jnp.zeros((10, 5))}, {"w": method}, key=jax.random.key(0))
      >>> int(jnp.sum(sj.merge(adapted)["w"] != 0)), sj.summary(adapted).trainable
      (5, 60)
    """
    rank = check_rank(rank, what="snell: rank")
    pieces = check_int("snell: pieces", pieces)
    if rank % pieces:
        raise RankError(f"snell: rank={rank} is not a multiple of pieces={pieces}; every piece has as many columns.")
    check_number("snell: sparsity", sparsity, least=0.0, most=1.0)
    check_choice("snell: kernel", kernel, ("distance", "linear", "sigmoid", "rbf"))
    check_choice("snell: rule", rule, ("soft", "hard"))
    check_probability("snell: dropout", dropout)
    check_probability("snell: drop_path", drop_path)
    dtype = check_dtype("snell: dtype", dtype)

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> KernelSparse:
        del stats
        require_matrix(array, role)
        inputs, outputs = role.sizes(array.shape)
        stack = role.stack_shape(array.shape)
        a, b = start_factors(key, stack, (inputs, outputs), rank, pieces, dtype)
        order = threshold_order(sparsity, inputs * outputs, rule)
        scalars: dict[str, Any] = {}
        if kernel in ("sigmoid", "rbf"):
            scalars = {n: jnp.full(stack, v, dtype) for n, v in (("alpha", 1.0), ("beta", 1.0), ("gamma", 0.0))}
        return KernelSparse(
            base=array,
            a=a,
            b=b,
            order=jnp.full(stack, order, jnp.int32),
            **scalars,
            kernel=kernel,
            rule=rule,
            competes=sparsity > 0,
            dropout=dropout,
            drop_path=drop_path,
            role=role,
            dtype=array.dtype,
            trainable=("a", "b", *scalars),
        )

    return Method("snell", make)


def start_factors(
    key: jax.Array, stack: tuple[int, ...], sizes: tuple[int, int], rank: int, pieces: int, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    r"""Draws both factors, uniform in \(\pm 1/\sqrt{d\,r/P}\) with \(d\) the side of each.

    Args:
      key: a random key; consumed.
      stack: sizes of stacked axes.
      sizes: in and out.
      rank: \(r\).
      pieces: \(P\).
      dtype: of the factors.

    Returns:
      `[*stack, pieces, in, rank / pieces]` and `[*stack, pieces, out, rank / pieces]`.

    Example:
      >>> import jax
      >>> [v.shape for v in start_factors(jax.random.key(0), (), (6, 4), 4, 2)]
      [(2, 6, 2), (2, 4, 2)]
    """
    width, found = rank // pieces, []
    for one, size in zip(jax.random.split(key), sizes, strict=True):
        bound = 1.0 / math.sqrt(size * width)
        drawn = jax.random.uniform(one, (*stack, pieces, size, width), jnp.float32, -bound, bound)
        found.append(drawn.astype(dtype))
    return found[0], found[1]


def to_entries(adapted: Params) -> Params:
    """Writes what the factors make as single entries added to the arrays: positions and values, and nothing else.

    Args:
      adapted: a tree with concrete weights from `snell`; other leaves stay as they are.

    Returns:
      The tree with `SparseDelta` weights of the same arrays, whose values learn.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> method = sj.methods.snell.snell(4, sparsity=0.9)
      >>> adapted = sj.adapt({"w": jnp.zeros((10, 5))}, {"w": method}, key=jax.random.key(0))
      >>> to_entries(adapted)["w"].values.shape
      (5,)
    """

    def convert(path: str, weight: KernelSparse) -> SparseDelta:
        del path
        added = np.asarray(weight.addition())
        flat = added.reshape(*added.shape[:-2], -1)
        indices = positions_of(flat != 0)
        padded = np.concatenate([flat, np.zeros((*flat.shape[:-1], 1), flat.dtype)], axis=-1)
        return SparseDelta(
            base=weight.base,
            indices=jnp.asarray(indices),
            values=jnp.asarray(np.take_along_axis(padded, indices, axis=-1)),
            mode="add",
            role=weight.role,
            dtype=weight.dtype,
            method=weight.method,
            trainable=("values",),
        )

    return map_weights(KernelSparse, convert, adapted)
