"""`soka`: factors a weight into Kronecker terms."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import (
    InitFn,
    Leaf,
    Method,
    PatternError,
    RankError,
    Role,
    StructureError,
    SubspaceError,
    check_choice,
    check_int,
    check_number,
    check_rank,
    leaves_with_paths,
    matches,
    nearest,
    require_matrix,
)
from subspace_jax.linalg import (
    Combine,
    KroneckerSplit,
    KroneckerSVD,
    allocate_terms,
    balanced_split,
    count_terms,
    kronecker_sum,
    kronecker_svd,
    wide_dtype,
)
from subspace_jax.methods.structured.soka._weight import KroneckerSum

# Up to this many rows or columns of the rearranged matrix a full decomposition is quick.
EXACT_UP_TO = 2048
# Columns beyond the wanted ones of a randomized decomposition.
OVERSAMPLE = 10

Split = Sequence[int]


def soka(
    terms: int | None = None,
    *,
    energy: float = 0.95,
    combine: Combine = "min",
    least: int = 1,
    most: int = 8,
    budget: int | None = None,
    split: Split | Mapping[str, Split] | None = None,
    delta: Any = None,
    svd: Literal["auto", "exact", "randomized"] = "auto",
    residual_dtype: Any = None,
) -> Method:
    r"""Trains the leading terms of a weight's Kronecker-product decomposition.

    \(W = W_{res} + \sum_{c \le r} \sigma_c\,U_c \otimes V_c\) with \(U_c\) `[m, n]`, \(V_c\) `[p, q]`: the best \(r\)
    terms, which start with factors of norm 1. A term has \(m n + p q + 1\) values, and its matrix may have full rank.

    As compiled for all kernels of MiniLM with four terms, a step has 1.4 times the operations of a LoRA step with as
    many values, and takes 1.9 times as long on a CPU: products with the small factors move more than they multiply.

    Args:
      terms: \(r\); None takes it from the spectrum, by `energy`, `combine`, `least` and `most`, or by `budget`.
      energy: share \(\tau\) of the squared singular values that the terms hold.
      combine: "min" (or "max") of the number of terms by energy and of that before the elbow of the spectrum, or
        "energy" or "elbow" alone.
      least: at least so many terms.
      most: at most so many terms; spectra of language models are flat, and would ask for hundreds.
      budget: number of trained values of all weights of this method together. After `least` terms for each, the term
        with the most energy per value comes next, until one does not fit, so that a larger budget never takes a term
        away; `energy` and `combine` do not count then.
      split: \((m, p, n, q)\), or a dict of them by path or glob; where there is none, the fewest values of a term.
      delta: a change of the weights, as a tree of arrays with their paths, to decompose instead of the weights. The
        weights then stay as bases, and the start is the weight plus the terms of its change.
      svd: "exact", "randomized", or "auto", which is exact up to a side of 2048 of the rearranged weight. The
        randomized one knows the whole energy, but looks for the elbow among the leading `most` + 10 values only.
      residual_dtype: dtype of \(W_{res}\); that of the weight if None.

    Returns:
      A method whose weights are `KroneckerSum`. Stacked layers with different numbers of terms have the largest of
      them, masked where it is too many.

    Raises:
      RankError: more terms than a split allows, a budget that is too small, or automatic terms of abstract weights.
      ValueError: an option or a split that does not fit; raised by `adapt`, with the path, where it depends on it.
      PatternError: `split` names a weight that the method does not have; raised by `adapt`.

    Warning:
      \(\sigma\) is large and the factors' entries small, so Adam moves the factors relatively fast: tune the learning
      rate. Weight decay would shrink the weight itself.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jax.random.normal(jax.random.key(1), (64, 128))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.soka(terms=4)}, key=jax.random.key(0))
      >>> adapted["w"].left.shape, adapted["w"].right.shape, sj.summary(adapted).trainable
      ((4, 8, 8), (4, 8, 16), 772)
      >>> bool(jnp.allclose(sj.merge(adapted)["w"], w, atol=1e-5))
      True
    """
    if terms is not None and budget is not None:
        raise RankError(f"soka: terms={terms} and budget={budget} were both given; the budget chooses the terms.")
    terms = None if terms is None else check_rank(terms, what="soka: terms")
    budget = None if budget is None else check_int("soka: budget", budget)
    most = check_rank(most, what="soka: most")
    least = check_int("soka: least", least, most=most)
    check_number("soka: energy", energy, above=0.0, most=1.0)
    check_choice("soka: combine", combine, get_args(Combine))
    check_choice("soka: svd", svd, ("auto", "exact", "randomized"))
    changes = None if delta is None else dict(leaves_with_paths(delta))

    def decompose(key: jax.Array, array: jax.Array, role: Role, split: Split | None, change: Any) -> _Found:
        require_matrix(array, role)
        sizes = _sizes(split, *role.sizes(array.shape))
        check_terms(terms or least, sizes)
        matrix = role.matrix(array if change is None else change).astype(wide_dtype(array.dtype))
        randomized = svd == "randomized" or (svd == "auto" and sizes.terms > EXACT_UP_TO)
        wanted = terms or (min(most + OVERSAMPLE, sizes.terms) if randomized else sizes.terms)
        factors = kronecker_svd(matrix, sizes, wanted, key=key if randomized else None, oversample=OVERSAMPLE)
        return _Found(factors, sizes, jnp.sum(matrix**2, axis=(-2, -1)))

    def make(
        key: jax.Array,
        array: jax.Array,
        role: Role,
        stats: Any,
        *,
        split: Split | None = None,
        change: Any = None,
        found: _Found | None = None,
        kept: np.ndarray | None = None,
    ) -> KroneckerSum:
        del stats
        if found is None:
            found = decompose(key, array, role, split, change)
        if terms is None and kept is None:
            if budget is not None:
                kept = _share([found], budget, least, most)[0]
            else:
                counted = count_terms(
                    found.factors.s, energy, combine, least=least, most=min(most, found.split.terms), total=found.energy
                )
                kept = _concrete(counted)
        factors, mask = _padded(found.factors, kept)
        base = array
        start: dict[str, Any] = {}
        if change is None:
            matrix = role.matrix(array).astype(wide_dtype(array.dtype))
            residual = matrix - kronecker_sum(factors.s * mask, factors.left, factors.right)
            base = role.unmatrix(residual, array.shape).astype(residual_dtype or array.dtype)
            # Copies: a donated step would otherwise hand the same buffer in twice.
            left, right = jnp.copy(factors.left), jnp.copy(factors.right)
            start = {"start_left": left, "start_right": right, "start_sigma": factors.s * mask}
        return KroneckerSum(
            base=base,
            left=factors.left,
            right=factors.right,
            sigma=factors.s,
            mask=mask,
            **start,
            role=role,
            dtype=array.dtype,
            trainable=("sigma", "left", "right"),
        )

    def plan(key: jax.Array, leaves: Mapping[str, Leaf]) -> dict[str, InitFn]:
        _check_splits(split, leaves)
        given = {path: _at_path(split, path) for path in leaves}
        change = {path: _change_at(changes, path, leaf) for path, leaf in leaves.items()}
        found: dict[str, Any] = {}
        kept: dict[str, Any] = {}
        if budget is not None:
            for i, (path, leaf) in enumerate(leaves.items()):
                try:
                    one_key = jax.random.fold_in(key, i)
                    found[path] = decompose(one_key, leaf.array, leaf.role, given[path], change[path])
                    _concrete(found[path].factors.s)
                except (SubspaceError, ValueError) as error:
                    raise type(error)(f"{path}: soka: {error}") from error
            kept = dict(zip(found, _share(list(found.values()), budget, least, most), strict=True))

        def one(path: str) -> InitFn:
            options = {"found": found.get(path), "kept": kept.get(path)}
            return functools.partial(make, split=given[path], change=change[path], **options)

        return {path: one(path) for path in leaves}

    return Method("soka", make, plan=plan)


class _Found(NamedTuple):
    """The terms of one leaf: their factors, sizes, and the energy `[*stack]` of all terms, found or not."""

    factors: KroneckerSVD
    split: KroneckerSplit
    energy: jax.Array


def check_terms(terms: int, split: KroneckerSplit) -> None:
    """Raises RankError if a split has fewer terms than are wanted."""
    if terms > split.terms:
        raise RankError(
            f"{terms} terms are wanted, and factors [{split.m}, {split.n}] and [{split.p}, {split.q}] have "
            f"{split.terms} at most; ask for fewer, or give another split=(m, p, n, q)."
        )


def _sizes(split: Split | None, inputs: int, outputs: int) -> KroneckerSplit:
    if split is None:
        return balanced_split(inputs, outputs)
    if len(split) != 4 or split[0] * split[1] != inputs or split[2] * split[3] != outputs or min(split) < 1:
        raise RankError(
            f"split={tuple(split)} does not fit a weight from {inputs} to {outputs}; expected (m, p, n, q) with "
            f"m p = {inputs} and n q = {outputs}, such as {tuple(balanced_split(inputs, outputs))}."
        )
    return KroneckerSplit(*split)


def _at_path(split: Split | Mapping[str, Split] | None, path: str) -> Split | None:
    if not isinstance(split, Mapping):
        return split
    return next((one for pattern, one in split.items() if matches(pattern, path)), None)


def _check_splits(split: Split | Mapping[str, Split] | None, paths: Iterable[str]) -> None:
    """Refuses a split for a path that the method does not have: a misspelled one would take another split."""
    paths = list(paths)
    for pattern in split if isinstance(split, Mapping) else ():
        if not any(matches(pattern, path) for path in paths):
            raise PatternError(
                f"soka: split has {pattern!r}, which matches no weight of this method; nearest are "
                f"{nearest(pattern.replace('**/', ''), paths)}."
            )


def _change_at(changes: Mapping[str, Any] | None, path: str, leaf: Leaf) -> Any:
    if changes is None:
        return None
    found = changes.get(path)
    if found is None or found.shape != leaf.array.shape:
        what = "nothing" if found is None else f"an array of shape {found.shape}"
        raise StructureError(
            f"{path}: soka: delta has {what} here, the weight has the shape {leaf.array.shape}; nearest paths are "
            f"{nearest(path, changes)}. Give a tree with the paths of the parameters."
        )
    return found


def _concrete(value: jax.Array) -> np.ndarray:
    """The array on the host, where shapes may follow from it."""
    try:
        return np.asarray(value)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise RankError(
            "the number of terms depends on the values of the weight, which are abstract here; pass terms=."
        ) from error


def _padded(factors: KroneckerSVD, kept: np.ndarray | None) -> tuple[KroneckerSVD, jax.Array]:
    """The factors cut to the largest number of terms of a stack, and the mask of those in use."""
    if kept is None:
        return factors, jnp.ones(factors.s.shape, jnp.float32)
    largest = max(int(kept.max()), 1)
    mask = jnp.asarray(np.arange(largest) < kept[..., None], jnp.float32)
    left, s, right = factors.left[..., :largest, :, :], factors.s[..., :largest], factors.right[..., :largest, :, :]
    return KroneckerSVD(left, s, right), mask


def _share(found: Sequence[_Found], budget: int, least: int, most: int) -> list[np.ndarray]:
    """How many terms every matrix of every leaf gets, `[*stack]` each."""
    short = sum(f.energy.size * least * f.split.values for f in found) - budget
    if short > 0:
        raise RankError(f"soka: budget={budget} is {short} values short of {least} term(s) for every weight.")
    spectra = [_concrete(f.factors.s) for f in found]
    return allocate_terms(spectra, [f.split.values for f in found], budget, least=least, most=most)
