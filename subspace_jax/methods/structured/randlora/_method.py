"""`randlora`: one set of bases for all weights of a rule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

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
from subspace_jax.methods.structured.randlora._weight import Pairing, RandomBases
from subspace_jax.weights import Route, hidden_zeros

Basis = Literal["dense", "sparse", "very_sparse"]
Scaling = Literal["official", "peft", "vision"]
Scales = Literal["rank_scales", "feature_scales"]

_OPTIONS: dict[str, tuple[str, ...]] = {
    "scaling": ("official", "peft", "vision"),
    "basis": ("dense", "sparse", "very_sparse"),
    "zero": ("rank_scales", "feature_scales"),
    "pairing": ("paper", "peft"),
    "route": ("auto", "factored", "materialized"),
}


def randlora(
    rank: int,
    *,
    alpha: float | None = None,
    scaling: Scaling = "official",
    basis: Basis = "dense",
    zero: Scales = "rank_scales",
    pairing: Pairing = "paper",
    extra_basis: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    basis_dtype: Any = jnp.float32,
    route: Route = "auto",
    group: Hashable = None,
) -> Method:
    r"""Trains the diagonals between random bases that all layers share: a full-rank update of few values.

    \(W + s \sum_{n=1}^{N} \Gamma_n A^T \Lambda_n B_n^T\) where the input side \(d\) is the smaller one,
    \(W + s \sum_n B_n \Lambda_n A\,\Gamma_n\) where the output side is; \(N = \lceil d / r \rceil\), so that the
    update can have rank \(d\). \(A\) and \(B_n\) are random and frozen. All weights of one method read slices of one
    pair of bases, which the first of them in the tree stores; methods of equal settings are one. Stored is what
    some weight reads, about as much as the largest weight; the authors' code sizes the bases by the largest inputs
    and outputs of any weights, which is four times that for the two kernels of an MLP. Files hold `seed` in place of
    the bases.

    Args:
      rank: \(r\). A larger one means fewer bases and fewer trained values.
      alpha: \(\alpha\); \(2 r\), \(20 r\) and 1 for the three scalings if None.
      scaling: "official" is \(s = \alpha / (r \sqrt N)\), as the authors' language code has it, \(2 / \sqrt N\) by
        default; "peft" is \(\alpha / r\), 20 by default; "vision" is \(\alpha / r\), as the authors' vision code has
        it, \(1 / r\) by default.
      basis: "dense" entries are uniform, "sparse" ones zero but for a third, "very_sparse" ones but for
        \(1 / \sqrt{d}\) of them, with \(d\) of the model's bases, not of the weight. PEFT's documentation says
        \(1 / \sqrt{d}\) for each sign where its code has half of that; this follows the code.
      zero: the scales that start at zero, \(\Lambda\) or, as in the authors' vision code, \(\Gamma\). Both at zero
        would never move.
      pairing: "peft" for values trained by PEFT; see `RandomBases`.
      extra_basis: \(N = \lfloor d / r \rfloor + 1\), one more where \(r\) divides \(d\), as in the vision code.
      dropout: probability of dropping an input of the bases in training; see `with_dropout`.
      seed: what the bases are drawn from; `adapt`'s key has no part in it.
      basis_dtype: dtype of the bases.
      route: how the weight is used; see `RandomBases`.
      group: methods of equal settings but different groups have bases of their own.

    Returns:
      A method whose weights are `RandomBases` with float32 `rank_scales` `[*stack, N, rank]` and `feature_scales`
      `[*stack, N, d]`, which start as 0 and \(1 / \max(N, d)\) (or as \(1 / \max(N, r)\) and 0).

    Raises:
      RankError: `rank` is not a positive integer.
      ValueError: another option is not one of those above, or out of its range.

    Warning:
      The scalings differ by a factor of 10 and more, and learning rates with them: 1e-4 of PEFT is not 1e-4 of the
      authors' code. The scales that do not start at zero are small, so the first steps are; warm-up helps.

    Note:
      Few values are not few operations. The bases reach rank \(N r \ge d\) together, so a product with them costs as
      much as one with a frozen kernel of \(K = d D\) entries. For T rows an adapter's step has 4 T K operations on the
      frozen kernel, forward and backward to the input. To this, factored bases add \(T N r (4 D + 6 d)\) and formed
      ones \(2 T K + 4 N r K\), of which "auto" takes the fewer; LoRA's factors add \(6 T r (d + D)\). With
      d = D = T = 512 and r = 32 that is 10 T K against 4.75 T K, and for ever more tokens 6 T K against 4.75 T K: a
      ratio near 1, which few trained values suggest, is out of reach of any order of these products.

      Compiled steps of the benchmark's 4 layers of width 512, all kernels adapted, 512 tokens: `randlora(32)` takes
      66.0 GFLOP, 2.09 times the 31.6 of `lora(32)` and 1.56 times the 42.3 of full fine-tuning, and 0.75 times the
      87.8 of `lora(512)`, whose update can have the same rank. With 4,096 tokens it takes 1.41 times those of
      `lora(32)`. What it saves beside full fine-tuning is the optimizer's state and the size of files.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"a": jnp.ones((8, 6)), "b": jnp.ones((6, 6))}
      >>> adapted = sj.adapt(params, {"*": sj.randlora(rank=4)}, key=jax.random.key(0))
      >>> adapted["a"].rank_scales.shape, adapted["a"].feature_scales.shape, adapted["a"].rank
      ((2, 4), (2, 6), 6)
      >>> adapted["a"].basis_b.shape, adapted["b"].basis_b
      ((2, 4, 8), None)
    """
    rank = check_rank(rank, what="randlora: rank")
    if alpha is not None:
        check_number("randlora: alpha", alpha, above=0.0)
    given = {"scaling": scaling, "basis": basis, "zero": zero, "pairing": pairing, "route": route}
    for name, value in given.items():
        check_choice(f"randlora: {name}", value, _OPTIONS[name])
    check_probability("randlora: dropout", dropout)
    seed = check_int("randlora: seed", seed, least=0, most=2**31 - 1)
    basis_dtype = check_dtype("randlora: basis_dtype", basis_dtype)
    settings = (rank, alpha, *given.values(), bool(extra_basis), dropout, seed, basis_dtype, group)

    def count(smaller: int) -> int:
        return smaller // rank + 1 if extra_basis else -(-smaller // rank)

    def make(
        key: jax.Array, array: jax.Array, role: Role, shapes: Collection[tuple[int, int]], owner: str | None
    ) -> RandomBases:
        """The weight of one leaf; `shapes` are the inputs and outputs of all that share its bases."""
        require_matrix(array, role)
        smaller, stack = min(role.sizes(array.shape)), role.stack_shape(array.shape)
        bases, widest = count(smaller), max(map(min, shapes))
        ranks, features = (hidden_zeros(key, (*stack, bases, size)) for size in (rank, smaller))
        if zero == "rank_scales":
            features = features + 1.0 / max(bases, smaller)
        else:
            ranks = ranks + 1.0 / max(bases, rank)
        weight = RandomBases(
            base=array,
            rank_scales=ranks.astype(jnp.float32),
            feature_scales=features.astype(jnp.float32),
            bases_shape=(count(widest), rank, max(map(max, shapes)), widest),
            basis_dtype=basis_dtype,
            sparsity=_sparsity(basis, shapes),
            seed=seed,
            scale=_scale(scaling, alpha, rank, bases),
            pairing=pairing,
            route=route,
            dropout=dropout,
            sides=role.sizes(array.shape),
            role=role,
            dtype=array.dtype,
            trainable=("rank_scales", "feature_scales"),
            links=() if owner is None else tuple((name, owner, name) for name in RandomBases.regenerated),
        )
        return dataclasses.replace(weight, **weight.regenerate()) if owner is None else weight

    def init(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> RandomBases:
        del stats
        require_matrix(array, role)
        return make(key, array, role, [role.sizes(array.shape)], None)

    def plan(key: jax.Array, leaves: Mapping[str, Leaf]) -> dict[str, InitFn]:
        del key
        # `make` refuses leaves that are not matrices, with their path.
        served = {path: leaf for path, leaf in leaves.items() if _is_matrix(leaf)}
        shapes = {path: leaf.role.sizes(leaf.array.shape) for path, leaf in served.items()}
        if not shapes:
            return {}
        sizes, first = set(shapes.values()), next(iter(shapes))

        def init_of(owner: str | None) -> InitFn:
            return lambda key, array, role, stats: make(key, array, role, sizes, owner)

        return {path: init_of(None if path == first else first) for path in leaves}

    return Method("randlora", init, plan=plan, settings=settings)


def _is_matrix(leaf: Leaf) -> bool:
    return leaf.role.is_matrix and sorted(leaf.role.order) == list(range(leaf.array.ndim))


def _sparsity(basis: Basis, shapes: Collection[tuple[int, int]]) -> float | None:
    """Returns one over the share of entries that are not zero; None for dense bases.

    Its side is the smaller of the largest inputs and the largest outputs, as in the released code.
    """
    inputs, outputs = (max(shape[side] for shape in shapes) for side in (0, 1))
    return {"dense": None, "sparse": 3.0, "very_sparse": math.sqrt(min(inputs, outputs))}[basis]


def _scale(scaling: Scaling, alpha: float | None, rank: int, bases: int) -> float:
    """Returns the factor of the sum over bases."""
    if alpha is None:
        alpha = {"official": 2.0 * rank, "peft": 20.0 * rank, "vision": 1.0}[scaling]
    return alpha / (rank * math.sqrt(bases)) if scaling == "official" else alpha / rank
