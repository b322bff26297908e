"""`adapt`: puts stand-in weights into a parameter tree by ordered rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core._compat import is_tracer
from subspace_jax.core._errors import (
    NonFiniteError,
    PatternError,
    RoleError,
    StatisticsError,
    SubspaceError,
    nearest,
)
from subspace_jax.core._finite import is_finite
from subspace_jax.core._full import Full
from subspace_jax.core._need import Need
from subspace_jax.core._partition import key_for
from subspace_jax.core._paths import leaves_with_paths, map_with_paths, matches
from subspace_jax.core._role import Role
from subspace_jax.core._selectors import Selector, check_selector, few, rule_pairs, selects
from subspace_jax.core._types import Params
from subspace_jax.core._weight import Weight, is_weight


class InitFn(Protocol):
    """Makes a stand-in weight out of an array."""

    def __call__(self, key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Weight:
        """Returns the weight.

        Args:
          key: a random key; it is consumed.
          array: the array to stand in for.
          role: how the model uses it.
          stats: the leaf's captured statistics; None if the method needs none.
        """
        ...


class Leaf(NamedTuple):
    """A leaf that a method plans for, before any stand-in weight is made.

    Attributes:
      array: the array.
      role: how the model uses it.
    """

    array: jax.Array
    role: Role


class PlanFn(Protocol):
    """Decides for all leaves of a method together, where one depends on another."""

    def __call__(self, key: jax.Array, leaves: Mapping[str, Leaf]) -> Mapping[str, InitFn]:
        """Returns the `init` of every leaf.

        Args:
          key: a random key; it is consumed.
          leaves: by path, every leaf that the rules give to this very method, in the tree's order.
        """
        ...


class Method(NamedTuple):
    """An adapter method: pure functions, as an optax transformation is.

    Attributes:
      name: what reports call it.
      init: makes the stand-in weight of one array.
      needs: statistics that `init` asks for: names such as "gram", or a `Need` where inputs are to be scaled.
      plan: for methods whose leaves depend on each other (shared bases, a budget over all layers, a bias that
        follows its kernel): gives each leaf its own `init`.
      settings: what makes two methods of one name the same: those of equal settings plan their leaves together. None
        where each call plans for itself alone.
      on_stored: whether `init` also takes a weight that only stores an array, such as packed blocks, for the array.
    """

    name: str
    init: InitFn
    needs: tuple[str | Need, ...] = ()
    plan: PlanFn | None = None
    settings: Hashable = None
    on_stored: bool = False


Rules = Mapping[Any, Method | None] | Sequence[tuple[Selector, Method | None]]


def full() -> Method:
    """Trains the selected arrays as they are; BitFit is `{"**/bias": full()}`.

    Returns:
      A method for arrays of any shape and floating dtype.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}, {"b": sj.full()}, key=jax.random.key(0))
      >>> jax.tree.map(jnp.shape, sj.partition(adapted)[0])["b"].value
      (3,)
    """

    def init(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Full:
        del key, stats
        return Full(value=array, role=role, dtype=array.dtype, trainable=("value",))

    return Method("full", init)


def adapt(
    params: Params,
    rules: Rules,
    *,
    key: jax.Array,
    roles: Mapping[str, Role] | None = None,
    stats: Mapping[str, Any] | None = None,
) -> Params:
    """Replaces arrays of a parameter tree by stand-in weights, as ordered rules select them.

    Args:
      params: any tree of arrays: Flax Linen, `nnx.to_pure_dict`, hand-made. Arrays may be abstract under
        `jax.eval_shape`.
      rules: ordered pairs, or a dict, of a selector and a method. A selector is a glob over slash-joined paths
        (`*` within a name, `**` any depth), a predicate of path and array, or a tuple of these, each of which must
        match something. The first rule that matches a leaf decides, and every rule must decide on a leaf; None as
        the method leaves the leaf as it is.
      key: a random key, consumed; each leaf's own key depends on its path only.
      roles: what `sj.roles` found, or parts of it written by hand, by path or glob. Without it two-dimensional
        arrays are `(in, out)`. Every entry must be of a leaf; entries of other collections than "params" may stay.
      stats: what `sj.capture` gathered, for methods that need it.

    Returns:
      A tree of the structure of `params` in which stand-in weights are leaves.

    Raises:
      PatternError: a rule selects nothing or nothing that earlier rules left over, an entry of `roles` is of no leaf,
        everything is left as it was, or a selected leaf cannot learn.
      RoleError: a method needs a matrix and how the model uses the leaf is not known.
      NonFiniteError: a selected leaf holds NaN or infinity.
      StatisticsError: a method's statistics are missing.
      RankError: a rank does not fit a leaf, whose path the message has; a method's other errors come through too.
      TypeError: a rule gives something that is no method, or its selector is no glob, predicate or tuple of these.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"block": {"kernel": jnp.ones((4, 3))}, "head": {"kernel": jnp.ones((3, 2))}}
      >>> adapted = sj.adapt(params, {"head/*": sj.full(), "**/kernel": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> [type(w).__name__ for w in jax.tree.leaves(adapted, is_leaf=sj.core.is_weight)]
      ['LowRank', 'Full']
    """
    leaves = leaves_with_paths(params)
    _check_roles(roles or {}, [path for path, _ in leaves])
    chosen = chosen_methods(params, rules)
    known = {path: _role(path, leaf, roles) for path, leaf in leaves if path in chosen}
    for path, leaf in leaves:
        if path in chosen:
            _check(path, leaf, chosen[path], stats)

    inits = _plan(key, {path: Leaf(leaf, known[path]) for path, leaf in leaves if path in chosen}, chosen)

    def one(path: str, leaf: Any) -> Any:
        method = chosen.get(path)
        if method is None:
            return leaf
        try:
            weight = inits[path](key_for(key, path), leaf, known[path], (stats or {}).get(path))
        except SubspaceError as error:
            if str(error).startswith(f"{path}: "):
                raise
            raise type(error)(f"{path}: {method.name}: {error}") from error
        return dataclasses.replace(weight, method=method.name)

    return map_with_paths(one, params)


def chosen_methods(params: Params, rules: Rules) -> dict[str, Method]:
    """Returns the method that ordered rules give each leaf, by path; leaves that get none are left out.

    Raises:
      PatternError: as `adapt`.
    """
    return _choose(rule_pairs(rules), leaves_with_paths(params))


def _choose(rules: list[tuple[Selector, Method | None]], leaves: list[tuple[str, Any]]) -> dict[str, Method]:
    """The method of each leaf that gets one. Every selector must match something, and every rule win something."""
    if not rules:
        raise PatternError('No rules were given. Pass, for instance, {"**/kernel": sj.lora(rank=8)}.')
    for selector, _ in rules:
        check_selector(selector, leaves, "Rule ")
    matching = {path: [i for i, (s, _) in enumerate(rules) if selects(s, path, leaf)] for path, leaf in leaves}
    _check_winners(rules, matching)
    chosen: dict[str, Method] = {}
    for path, hits in matching.items():
        if hits and (method := rules[hits[0]][1]) is not None:
            if not isinstance(method, Method):
                raise TypeError(
                    f"{path}: the rule gives {type(method).__name__} {method!r}; expected a method such as "
                    "sj.lora(rank=8), or None to leave the leaf as it is."
                )
            chosen[path] = method
    if not chosen:
        raise PatternError(
            "Nothing would be adapted: every leaf that the rules match is given None. Give some of them a method."
        )
    return chosen


def _check_winners(rules: list[tuple[Selector, Method | None]], matching: Mapping[str, list[int]]) -> None:
    """Refuses a rule that decides on no leaf, because earlier ones took all that it matches."""
    winners = {hits[0] for hits in matching.values() if hits}
    for i, (selector, _) in enumerate(rules):
        if i in winners:
            continue
        taken = {path: rules[hits[0]][0] for path, hits in matching.items() if i in hits}
        by = ", ".join(map(repr, dict.fromkeys(taken.values())))
        raise PatternError(
            f"Rule {selector!r} decides on no leaf: all that it matches ({few(list(taken))}) are taken by the earlier "
            f"{by}. The first matching rule wins: put the special rule before the general one, or drop it."
        )


def _check_roles(roles: Mapping[str, Role], paths: list[str]) -> None:
    """Refuses a role for a path that the tree does not have: a misspelled one would leave the leaf without."""
    known = {*paths, *(f"params/{path}" for path in paths)}
    # What `roles` found in {"params": ..., "batch_stats": ...} serves for the parameters alone.
    collections = any(name in known and name not in paths for name in roles)
    for pattern in roles:
        if pattern in known or any(matches(pattern, path) for path in paths):
            continue
        if collections and not pattern.startswith("params/"):
            continue
        raise PatternError(
            f"roles: {pattern!r} matches no leaf; nearest paths: {nearest(pattern.replace('**/', ''), paths)}. Take "
            "roles from sj.roles(fn, params, ...) of this tree, or mend the path."
        )


def _plan(key: jax.Array, leaves: Mapping[str, Leaf], chosen: Mapping[str, Method]) -> dict[str, InitFn]:
    """The `init` of each leaf; a method with a plan sees all its leaves at once."""
    inits = {path: method.init for path, method in chosen.items()}
    groups: dict[Any, list[str]] = {}
    for path in leaves:
        groups.setdefault(_identity(chosen[path]), []).append(path)
    for paths in groups.values():
        method = chosen[paths[0]]
        if method.plan is not None:
            inits |= method.plan(key_for(key, method.name), {path: leaves[path] for path in paths})
    return inits


def _identity(method: Method) -> Hashable:
    """What methods that plan together have in common: name and settings; else a method plans for itself."""
    return id(method) if method.settings is None else (method.name, method.settings)


def _check(path: str, leaf: Any, method: Method, stats: Mapping[str, Any] | None) -> None:
    """Refuses a leaf that cannot learn, before anything is computed."""
    if is_weight(leaf) and leaf.stored:
        _check_stored(path, leaf, method)
        return
    if is_weight(leaf):
        raise PatternError(
            f"{path}: is already a {type(leaf).__name__} made by {leaf.method!r}. merge() it first, or compose the "
            "methods: dora(pissa(rank=16))."
        )
    dtype = getattr(leaf, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
        raise PatternError(
            f"{path}: holds {dtype}; adapt its real and its imaginary part, as two leaves of which the function makes "
            "the array again, w = jax.lax.complex(p['re'], p['im']), run by "
            'with_adapters(fn, on_materialize="allow").'
        )
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise PatternError(
            f"{path}: holds {dtype or type(leaf).__name__}; only floating-point arrays can be adapted. "
            "Narrow the pattern, or put a rule with None before it."
        )
    if isinstance(leaf, (jax.Array, np.ndarray)) and not is_tracer(leaf):
        finite = is_finite(leaf)  # inside a trace this is not known either
        if not is_tracer(finite) and not bool(finite):
            raise NonFiniteError(f"{path}: the weight holds NaN or infinity; load a sound checkpoint.")
    found = (stats or {}).get(path)
    names = tuple(need.statistic if isinstance(need, Need) else need for need in method.needs)
    missing = [name for name in names if found is None or found.get(name) is None]
    if missing:
        raise StatisticsError(
            f"{path}: {method.name} needs {', '.join(missing)}, which were not captured. Pass "
            f"stats=sj.capture(fn, params, batches, statistics={names!r}), or rules= in its place."
        )


def _check_stored(path: str, leaf: Weight, method: Method) -> None:
    """Refuses a method that needs the numbers of an array which is only stored in fewer bits."""
    if not method.on_stored:
        raise PatternError(
            f"{path}: is stored as {type(leaf).__name__}, and {method.name} needs the array itself. Take sj.qlora() or "
            "sj.lora(), which stand on stored weights, or merge() the tree first, which forms them."
        )


def _role(path: str, leaf: Any, roles: Mapping[str, Role] | None) -> Role:
    """The given role; else (in, out) for two axes and none for others, which methods refuse that need a matrix.

    What is written by hand, for the path itself or by a glob, counts more than what `roles` found.
    """
    if is_weight(leaf):
        return leaf.role  # what stores an array knows how it is read
    given = [roles[name] for name in (path, f"params/{path}") if name in roles] if roles else []
    given += [role for pattern, role in roles.items() if matches(pattern, path)] if roles else []
    role = next((r for r in given if not r.found), given[0] if given else None)
    if role is not None and not (role.found and role.kind == "other" and getattr(leaf, "ndim", 0) == 2):
        return dataclasses.replace(role, found=False)
    # A use that cannot be followed says nothing about a kernel of two axes.
    return Role.dense() if getattr(leaf, "ndim", 0) == 2 else role or Role("other")


def require_matrix(array: jax.Array, role: Role) -> None:
    """Raises RoleError unless the role reads the array as a stack of matrices; for `init` functions.

    Args:
      array: the array to adapt.
      role: its role.
    """
    if not role.is_matrix and array.ndim > 2 and not role.primitive:
        raise RoleError(
            f"shape {array.shape} has {array.ndim} axes, so which of them are inputs is not known (kernel of a "
            "DenseGeneral, a convolution, a stack of layers?). Pass roles=sj.roles(fn, params, *example_inputs), or "
            "roles={'pattern': sj.Role.dense(in_axes=..., out_axes=...)}."
        )
    role.check(array.shape)
