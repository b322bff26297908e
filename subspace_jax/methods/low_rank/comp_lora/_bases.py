"""The leading singular directions of weights, and how many of them are protected."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import (
    Params,
    RankError,
    Role,
    check_choice,
    check_int,
    check_number,
    leaves_with_paths,
    require_matrix,
    select_paths,
)
from subspace_jax.linalg import energy_terms, truncated_svd, wide_dtype

Sides = Literal["both", "in", "out"]
Protect = int | Literal["all_but_rank"] | None
Pair = tuple[jax.Array | None, jax.Array | None]


def principal_bases(
    params: Params,
    select: Any,
    *,
    protect: int | None = None,
    energy: float = 0.5,
    roles: Mapping[str, Role] | None = None,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    r"""Returns the leading singular directions of weights, for full fine-tuning in their complement.

    `sj.project_orthogonal(bases, "remove", "both")` last in the chain, with no decay after it, gives
    \(u - U U^T u - u V V^T + U U^T u V V^T\) of every update, and the protection of `comp_lora` without its low rank.
    Before Adam it does not: Adam's scaling of entries leads out again.

    Args:
      params: the parameters.
      select: globs or a predicate of path and array: which weights.
      protect: \(p\), the number of directions; None takes it from the spectrum.
      energy: share of the squared singular values that protected directions hold, for `protect=None`.
      roles: how the model uses arrays with more than two axes, from `sj.roles`.

    Returns:
      By path a pair of `[*stack, in, p]` and `[*stack, out, p]` in float32.

    Raises:
      RankError: `protect` is not an integer below the weight's smaller side; the message has the path.
      PatternError: a glob matches nothing.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> params = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
      >>> [v.shape for v in sj.methods.comp_lora.principal_bases(params, "w", protect=1)["w"]]
      [(3, 1), (3, 1)]
    """
    check_options("principal_bases", protect, energy, "both")
    leaves, found = dict(leaves_with_paths(params)), {}
    for path in select_paths(params, select):
        array = leaves[path]
        role = (roles or {}).get(path, Role.dense())
        try:
            require_matrix(array, role)
            left, right = directions(array, role, protect, energy, "both", rank=1)
        except RankError as error:
            raise RankError(f"{path}: principal_bases: {error}") from error
        if left is not None and right is not None:
            found[path] = (left, right)
    return found


def check_options(what: str, protect: Protect, energy: float, sides: Sides) -> None:
    """Refuses options that no weight can serve."""
    check_choice(f"{what}: sides", sides, get_args(Sides))
    check_number(f"{what}: energy", energy, above=0.0, most=1.0)
    if isinstance(protect, str):
        check_choice(f"{what}: protect", protect, ("all_but_rank",))
    elif protect is not None:
        check_int(f"{what}: protect", protect, least=0)


def directions(array: Any, role: Role, protect: Protect, energy: float, sides: Sides, *, rank: int) -> Pair:
    """Returns the protected directions of one weight's sides; None for a side without.

    Raises:
      RankError: nothing would be left to learn, or the number depends on values that are abstract.
    """
    inputs, outputs = role.sizes(array.shape)
    smaller = min(inputs, outputs)
    matrix = role.matrix(array).astype(wide_dtype(array.dtype))
    if protect is None:
        svd = truncated_svd(matrix, smaller)
        counts = np.minimum(_concrete(energy_terms(svd.s, energy)), smaller - 1)
        count = int(counts.max())
    else:
        count = max(smaller - rank, 0) if isinstance(protect, str) else protect
        room = {"both": smaller - 1, "in": inputs - 1, "out": outputs - 1}[sides]
        if count > min(room, smaller):
            raise RankError(
                f"protect={protect!r} of a weight from {inputs} to {outputs} leaves nothing to learn for "
                f"sides={sides!r}; choose at most {min(room, smaller)}."
            )
        svd = None if count == 0 else truncated_svd(matrix, count)
        counts = np.asarray(count)
    if smaller - count < rank:
        warnings.warn(
            f"comp_lora: {count} of {smaller} directions of a weight of shape {tuple(array.shape)} are protected, so "
            f"its addition has at most rank {smaller - count}, below rank={rank}.",
            stacklevel=2,
        )
    if svd is None or count == 0:
        return None, None
    # Layers of a stack differ: columns of zeros protect nothing, and keep shapes equal.
    kept = jnp.asarray(np.arange(count) < counts[..., None], svd.u.dtype)[..., None, :]
    left, right = svd.u[..., :count] * kept, jnp.swapaxes(svd.vt[..., :count, :], -1, -2) * kept
    return (left if sides != "out" else None), (right if sides != "in" else None)


def _concrete(counts: jax.Array) -> np.ndarray:
    try:
        return np.asarray(counts)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise RankError(
            "the number of protected directions depends on the values of the weight, which are abstract here; pass "
            "protect=."
        ) from error
