"""Runs optimizers in the coordinates of a subspace.

GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (Zhao et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from subspace_jax.core import (
    OptState,
    Params,
    PyTree,
    Role,
    Updates,
    check_choice,
    check_int,
    leaves_with_paths,
    select_paths,
)
from subspace_jax.linalg import Side, complete
from subspace_jax.optim._bases import bases_by_path, check_bases, check_orthonormal
from subspace_jax.optim._holes import Leaves, update_resting
from subspace_jax.optim._matrix_views import matrix_views
from subspace_jax.optim._subspace_map import (
    Moments,
    Move,
    SideRule,
    matrix_shape,
    moved_moments,
    places_of,
    subspace_map,
)

Decomposition = Literal["exact", "randomized"]


class InSubspaceState(NamedTuple):
    """State of `in_subspace`.

    Attributes:
      count: int32 scalar, steps taken.
      basis: a tree like the parameters with bases `[*stack, d, k]` in float32, and `optax.MaskedNode` for arrays
        that pass as they are.
      inner: state of the inner optimizer, of coordinates `[*stack, k, out]` or `[*stack, in, k]`.
    """

    count: jax.Array
    basis: Any
    inner: Any


def in_subspace(
    inner: optax.GradientTransformation,
    basis: Any = None,
    *,
    rank: int | None = None,
    every: int = 200,
    side: SideRule | None = None,
    moments: Moments = "carry",
    scale: Any = 1.0,
    residual: Literal["discard"] = "discard",
    decomposition: Decomposition = "exact",
    seed: int = 0,
    select: Callable[[str, Any], bool] | str | Iterable[str] | None = None,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an optimizer in the coordinates of a subspace: GaLore, or a subspace that is given.

    \(u = s\,U\,\mathrm{inner}(U^T G)\) for side "in", \(u = s\,\mathrm{inner}(G U)\,U^T\) for "out". The inner
    optimizer's state has the size of the coordinates. The part of a gradient outside the subspace is dropped.

    With `rank`, \(U\) are the leading singular vectors of the gradient, found anew every `every` steps, the first one
    included; every matrix has a subspace. With `basis`, subspaces are fixed and arrays without one pass as they are.
    Arrays that pass go to the same inner optimizer in full, and are not scaled.

    The inner optimizer sees coordinates, so it cannot use parameters: give `optax.scale_by_adam()`, not `optax.adamw`,
    and chain `optax.add_decayed_weights` after this. Adam is not invariant to rotations, so its path depends on the
    basis within the subspace, not on the subspace alone.

    Args:
      inner: the optimizer of coordinates.
      basis: \(U\) by path, `[*stack, d, k]` with orthonormal columns or zero columns beyond its rank.
      rank: number of singular vectors; of a matrix with a shorter side, that.
      every: steps from one decomposition to the next.
      side: which side the subspace lies in. "shorter" (default with `rank`) is the authors' "std": the state is
        `[*stack, k, out]` where out is the longer side; "longer" is what `optax.contrib.galore` does, and the authors'
        "reverse_std". "in" (default with `basis`) and "out" are one side for all.
      moments: what becomes of the inner optimizer's moments as the basis changes. "carry" keeps them although they
        belong to other coordinates, as the authors do; "reset" makes them zero (the count that corrects their bias
        stays, so that Adam's next step is up to \((1-\beta_1)/\sqrt{1-\beta_2}\), 3 times, its usual size);
        "transport" turns them: \(M \mapsto R M\) and \(V \mapsto (R \circ R) V\) with \(R = U_{new}^T U_{old}\).
      scale: \(s\), of arrays with a subspace; a number or scalar array.
      residual: "discard" what lies outside the subspace.
      decomposition: "exact", or "randomized" for a large matrix and small rank.
      seed: of the randomized decomposition.
      select: globs or a predicate of path and array that choose, with `rank`, which matrices get a subspace.
      roles: how the model uses plain arrays with more than two axes, from `sj.roles`; without it those pass.

    Returns:
      A transformation that keeps structure, shapes and dtypes. With `optax.inject_hyperparams` name `inner`, `rank`,
      `every`, `seed` and a predicate `select` in `static_args`.

    Raises:
      ValueError: neither or both of `basis` and `rank`, an unknown option, or an inner optimizer that needs parameters.
      RankError: `rank` or `every` is not a positive integer.
      PatternError: a basis is for no leaf, or a glob matches nothing.
      RoleError: an array with a basis is not known to be a matrix.
      StructureError: a basis does not fit its array, is not in float32 at least, or has columns that are neither
        orthonormal nor zero.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> optimizer = optax.chain(sj.optim.in_subspace(optax.scale_by_adam(), rank=2), optax.scale(-1e-2))
      >>> state = optimizer.init({"w": jnp.ones((4, 9))})
      >>> state[0].basis["w"].shape, state[0].inner.mu["w"].shape
      ((4, 2), (2, 9))

    References:
      Zhao, Zhang, Chen, Wang, Anandkumar, Tian, GaLore, ICML 2024.
    """
    _check_options(basis, rank, every, side, moments, residual, decomposition)
    extended = optax.with_extra_args_support(inner)
    rule: SideRule = side or ("in" if rank is None else "shorter")
    given = {} if basis is None else bases_by_path(basis, rule)  # pyright: ignore[reportArgumentType]

    def start(params: Params) -> list[Any]:
        """A basis, or MaskedNode, for each array."""
        if rank is None:
            check_bases(given, params, rule, roles)  # pyright: ignore[reportArgumentType]
            check_orthonormal(given, rule)  # pyright: ignore[reportArgumentType]
            wanted: Any = given
        else:
            wanted = [p for p, _ in leaves_with_paths(params)] if select is None else select_paths(params, select)
        found: list[Any] = []
        for leaf, view in zip(jax.tree.leaves(params), matrix_views(params, roles), strict=True):
            place = subspace_map(view, leaf, rule)
            if place is None or place.view.path not in wanted:
                found.append(optax.MaskedNode())
            elif rank is None:
                found.append(jnp.copy(given[place.view.path]))  # a step that donates its state frees it
            else:
                size = min(rank, *matrix_shape(leaf, place.view)[-2:])
                found.append(place.empty(leaf, size, basis=True))
        return found

    def init(params: Params) -> InSubspaceState:
        leaves, treedef = jax.tree.flatten(params)
        bases = start(params)
        proxies = [
            leaf if place is None else place.empty(leaf, columns.shape[-1], basis=False)
            for leaf, columns, place in zip(leaves, bases, places_of(params, bases, rule, roles), strict=True)
        ]
        coordinates = jax.tree.unflatten(treedef, proxies)
        state = extended.init(coordinates)
        if leaves:
            _refuse_params(extended, coordinates, state)
        return InSubspaceState(jnp.zeros([], jnp.int32), jax.tree.unflatten(treedef, bases), state)

    def update(
        updates: Updates, state: OptState, params: Params = None, **extra: Any
    ) -> tuple[Updates, InSubspaceState]:
        held = Leaves(updates)
        bases = held.of(state.basis)
        places = places_of(updates, bases, rule, roles)

        def refresh() -> tuple[list[Any], Any]:
            key = None if decomposition == "exact" else jax.random.fold_in(jax.random.key(seed), state.count)
            new = [
                columns
                if place is None
                else place.leading(leaf, columns, None if key is None else jax.random.fold_in(key, i))
                for i, (leaf, columns, place) in enumerate(zip(held.arrays, bases, places, strict=True))
            ]
            moved = [None if p is None else Move(p.side, *c) for p, *c in zip(places, bases, new, strict=True)]
            return new, moved_moments(state.inner, moved, held, moments)

        inside = state.inner
        if rank is not None:
            bases, inside = lax.cond(state.count % every == 0, refresh, lambda: (bases, state.inner))
        coordinates = [
            # A fixed subspace may be orthogonal to a gradient; a refreshed one holds as much of it as it can.
            leaf if place is None else place.coordinates(leaf, columns, drop_rounding=rank is None)
            for leaf, columns, place in zip(held.arrays, bases, places, strict=True)
        ]
        # The parameters have other shapes than coordinates; they tell only what has no gradient.
        directions, inside = update_resting(extended, held.tree(coordinates), inside, params, None, **extra)
        lifted = [
            direction if place is None else place.lifted(direction, columns, scale, leaf)
            for direction, columns, place, leaf in zip(held.of(directions), bases, places, held.arrays, strict=True)
        ]
        count = jnp.asarray(optax.safe_increment(state.count))
        return held.tree(lifted), InSubspaceState(count, held.kept(bases, state.basis), inside)

    return optax.GradientTransformationExtraArgs(init, update)


def in_complement(
    inner: optax.GradientTransformation,
    basis: Any,
    side: Side = "in",
    *,
    scale: Any = 1.0,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an optimizer in the coordinates of the complement of given subspaces.

    The exact way to keep an adaptive optimizer out of a subspace: \(U^T u = 0\) whatever the inner optimizer does, and
    its moments are orthogonal to the removed directions. It stores a basis of the complement, `[*stack, d, d - k]`;
    where that is too large, `sandwich` needs the subspace's own alone.

    Args:
      inner: the optimizer of coordinates, which cannot use parameters.
      basis: \(U\) by path, `[*stack, d, k]`, concrete.
      side: which axis the subspaces lie in.
      scale: multiplies the updates of arrays with a subspace; a number or scalar array.
      roles: how the model uses plain arrays with more than two axes, from `sj.roles`; without it those pass.

    Returns:
      A transformation like that of `in_subspace`.

    Raises:
      StructureError: a basis has columns that are neither orthonormal nor zero; at `init`, it does not fit its array.
      PatternError: at `init`, a basis is for no leaf.
      RoleError: at `init`, an array with a basis is not known to be a matrix.
      ValueError: `side` is unknown; at `init`, the inner optimizer needs parameters.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> optimizer = sj.optim.in_complement(optax.scale_by_adam(), {"w": jnp.eye(3)[:, :1]})
      >>> params = {"w": jnp.ones((3, 2))}
      >>> updates, _ = optimizer.update(params, optimizer.init(params))
      >>> [round(abs(v), 3) for v in updates["w"][:, 0].tolist()]
      [0.0, 1.0, 1.0]
    """
    given = bases_by_path(basis, side)
    check_orthonormal(given, side)
    complements = {path: complete(columns) for path, columns in given.items()}
    return in_subspace(inner, complements, side=side, scale=scale, roles=roles)


def _check_options(
    basis: Any, rank: Any, every: Any, side: Any, moments: Any, residual: Any, decomposition: Any
) -> None:
    if (basis is None) == (rank is None):
        raise ValueError(
            "in_subspace: give either rank=, for the leading singular vectors of the gradients, or basis=, for fixed "
            f"subspaces; got {'neither' if rank is None else 'both'}."
        )
    for name, value in (("rank", rank), ("every", every)):
        if value is not None:
            check_int(f"in_subspace: {name}", value)
    choices = {
        "side": (side, (None, "in", "out") if rank is None else (None, "shorter", "longer", "in", "out")),
        "moments": (moments, ("carry", "reset", "transport")),
        "residual": (residual, ("discard",)),
        "decomposition": (decomposition, ("exact", "randomized")),
    }
    for name, (value, known) in choices.items():
        check_choice(f"in_subspace: {name}", value, known)


def _refuse_params(inner: optax.GradientTransformationExtraArgs, coordinates: PyTree, state: OptState) -> None:
    """Raises where the inner optimizer works with parameters only; what else it may need comes with the update."""

    def works(params: Params) -> bool:
        try:
            jax.eval_shape(lambda: inner.update(coordinates, state, params))
        except Exception:  # whatever a transformation makes of missing arguments
            return False
        return True

    if not works(None) and works(coordinates):
        raise ValueError(
            "in_subspace: the inner optimizer needs the parameters, but it runs in coordinates, which have other "
            "shapes. Give the bare direction, such as optax.scale_by_adam() for optax.adamw(), and chain "
            "optax.add_decayed_weights() and the like after in_subspace."
        )
