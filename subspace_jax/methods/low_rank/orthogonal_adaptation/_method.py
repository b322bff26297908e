"""`orthogonal_adaptation`: trains the output side over frozen columns of a shared basis."""

from __future__ import annotations

import functools
import math
import warnings
import zlib
from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import (
    InitFn,
    Leaf,
    Method,
    Role,
    check_choice,
    check_dtype,
    check_int,
    check_number,
    check_probability,
    check_rank,
    require_matrix,
)
from subspace_jax.methods.low_rank.orthogonal_adaptation._basis import (
    QR_UP_TO,
    Basis,
    Mode,
    choose_columns,
    draw_columns,
    overlap,
)
from subspace_jax.methods.low_rank.orthogonal_adaptation._weight import ConceptLowRank
from subspace_jax.weights import hidden_zeros, lora_scale


def orthogonal_adaptation(
    rank: int,
    *,
    concept: int,
    alpha: float | None = None,
    mode: Mode = "slot",
    basis: Basis = "auto",
    basis_scale: float = 1.0,
    per_kernel: bool = False,
    seed: int = 0,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
) -> Method:
    r"""Trains one concept over its own columns of a basis that all concepts share: \(W + s\,Q_i\,b_i\).

    \(Q_i = c\,O_{:, J_i}\) holds \(r\) columns of an orthonormal basis \(O\) of the inputs, which follows from `seed`
    and the number of inputs alone, and never learns. Concepts trained apart, with disjoint columns, have orthogonal
    changes: \(\delta_i^T \delta_j = 0\), squared norms add up, and in the sum of all, `merge_concepts`, an input in
    the span of \(Q_i\) meets concept \(i\) alone. Other inputs meet the others' changes as well: the crosstalk
    \(s\,(x Q_j)\,b_j\) is zero for inputs without a part in \(Q_j\), and not in general.

    Args:
      rank: \(r\), columns of a concept.
      concept: \(i\), the concept's number, from 0.
      alpha: \(s = \alpha / r\); `rank` if None.
      mode: how the columns \(J_i\) are chosen. "slot" takes \(i r\) to \(i r + r - 1\) of one random order, disjoint
        for up to \(\lfloor n / r \rfloor\) concepts. "random" draws them for each concept, as published; `overlap`
        tells what two of them share. "gaussian" has no basis: entries are \(N(0, 1/n)\), orthogonal on average.
        "shared" gives all concepts the columns of concept 0, an ablation.
      basis: "qr" of a Gaussian matrix in float64 on the host, which takes \(O(n^3)\) once; "cosine", a cosine
        transform with random signs, of which only the needed columns are made; "auto" takes "qr" up to 2048 inputs.
      basis_scale: \(c\); the one implementation that was read has 0.5.
      per_kernel: a basis for each kernel and layer, in place of one for all kernels of as many inputs.
      seed: of the basis; all concepts must have the same.
      dropout: probability of dropping an input of the adapter in training; see `with_dropout`.
      dtype: dtype of `b`; the columns are in float32, since rounded ones are less orthogonal.

    Returns:
      A method whose weights are `ConceptLowRank` with frozen `a` `[*stack, in, rank]` and `b` `[*stack, rank, out]`,
      which learns and starts at zero.

    Raises:
      RankError: `rank` is above the number of inputs, or slots have run out; raised by `adapt`, with the path.
      ValueError: another option is out of its range.

    Note:
      Convolutions are read as matrices from window and channels to outputs; the implementation that was read leaves
      them to LoRA. Over embeddings the basis is of the vocabulary. A step has 1.02 times the operations of LoRA's with
      as many values, all kernels of the benchmark's transformer adapted.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> method = sj.methods.orthogonal_adaptation.orthogonal_adaptation
      >>> params, key = {"w": jnp.ones((6, 4))}, jax.random.key(0)
      >>> one, two = (sj.adapt(params, {"w": method(2, concept=i)}, key=key) for i in (0, 1))
      >>> sj.summary(one).trainable, bool(jnp.abs(one["w"].a.T @ two["w"].a).max() < 1e-6)
      (8, True)
    """
    rank, concept = check_rank(rank, what=f"{_NAME}: rank"), check_int(f"{_NAME}: concept", concept, least=0)
    scale = lora_scale(rank, alpha, what=f"{_NAME}: alpha")
    check_choice(f"{_NAME}: mode", mode, get_args(Mode))
    check_choice(f"{_NAME}: basis", basis, get_args(Basis))
    check_number(f"{_NAME}: basis_scale", basis_scale, above=0.0)
    seed = check_int(f"{_NAME}: seed", seed, least=0, most=2**31 - 1)
    check_probability(f"{_NAME}: dropout", dropout)
    dtype = check_dtype(f"{_NAME}: dtype", dtype)

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any, *, path: str = "") -> ConceptLowRank:
        del stats
        require_matrix(array, role)
        stack, (inputs, outputs) = role.stack_shape(array.shape), role.sizes(array.shape)
        tag = zlib.crc32(path.encode()) if per_kernel else 0
        kind: Basis = ("qr" if inputs <= QR_UP_TO else "cosine") if basis == "auto" else basis
        columns = choose_columns(seed, tag, mode, concept, rank, inputs)
        if mode == "random" and (concept + 1) * rank > inputs:
            _warn_of_overlap(concept, rank, inputs)
        layers = math.prod(stack) if per_kernel else None
        q = draw_columns(seed, tag, inputs, columns, layers, kind, concept if mode == "gaussian" else None)
        q = np.broadcast_to(q if layers is None else q.reshape(*stack, inputs, rank), (*stack, inputs, rank))
        return ConceptLowRank(
            base=array,
            a=jnp.asarray(basis_scale * q, jnp.float32),
            b=hidden_zeros(key, (*stack, rank, outputs), dtype),
            columns=jnp.asarray(columns, jnp.int32),
            seed=jnp.asarray([seed, tag], jnp.uint32),
            scale=scale,
            mode=mode,
            basis=kind,
            dropout=dropout,
            role=role,
            dtype=array.dtype,
            trainable=("b",),
        )

    def plan(key: jax.Array, leaves: Mapping[str, Leaf]) -> dict[str, InitFn]:
        del key
        return {path: functools.partial(make, path=path) for path in leaves}

    return Method(_NAME, make, plan=plan if per_kernel else None)


_NAME = "orthogonal_adaptation"


def _warn_of_overlap(concept: int, rank: int, inputs: int) -> None:
    warnings.warn(
        f"{_NAME}: {concept + 1} concepts of rank {rank} are more columns than the {inputs} of the basis; with "
        f'mode="random" two of them share {overlap(rank, inputs).expected:.2g} on average.',
        stacklevel=2,
    )
