"""`composable_sft`: trains the additions of a selection; and the two phases that find it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import (
    InitFn,
    Leaf,
    Method,
    Params,
    PatternError,
    Role,
    StructureError,
    adapt,
    check_int,
    full,
    is_weight,
    leaves_with_paths,
    map_with_paths,
    matches,
    merge,
    nearest,
)
from subspace_jax.linalg import wide_dtype
from subspace_jax.methods.sparse.composable_sft._selection import Selection, maskable_arrays, select_changed
from subspace_jax.weights import SparseDelta, entries_at, flat_entries, hidden_zeros, positions_of


def composable_sft(selection: Selection, *, current: Params | None = None, keep_formed: bool = False) -> Method:
    r"""Trains additions to the chosen entries of a tree, \(\theta_s + \phi\) with the support of the selection.

    Nothing of an array's size is kept for a task: positions and additions, of which files hold the same. Select the
    arrays by `{selection.paths: composable_sft(selection)}` and train the task's head by `sj.full()`.

    Args:
      selection: of `select_changed`.
      current: a tree of arrays in which the chosen entries already differ; the additions start at the difference
        from the arrays that are adapted. They start at zero if None: the rewinding of the lottery ticket.
      keep_formed: give True where the model is rematerialized; see `SparseDelta`.

    Returns:
      A method whose weights are `SparseDelta` with additions `[*stack, k]`.

    Raises:
      PatternError: the rule matches an array that the selection has not; raised by `adapt`.
      StructureError: an array has another shape than it had in the selection; raised by `adapt`.

    Note:
      Published, with Adam and linear decay, gradients clipped at norm 1 after masking: 7,667,712 entries for a language
      and 14,155,776 for a task, of multilingual BERT; 5e-5, or 2e-5 and 3e-5 for inference and question answering;
      `distance` at 0.1 for languages and 0 for tasks.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> sft = sj.methods.composable_sft
      >>> params = {"w": jnp.zeros((2, 3))}
      >>> chosen = sft.select_changed(params, {"w": jnp.arange(6.0).reshape(2, 3)}, 2)
      >>> adapted = sj.adapt(params, {chosen.paths: sft.composable_sft(chosen)}, key=jax.random.key(0))
      >>> adapted["w"].indices.tolist(), adapted["w"].values.tolist()
      ([4, 5], [0.0, 0.0])
    """
    now = {} if current is None else dict(leaves_with_paths(current))

    def of(path: str, array: Any) -> InitFn:
        if path not in selection.chosen:
            raise PatternError(
                f"{path}: composable_sft: is not in the selection; nearest are {nearest(path, selection.paths)}. Match "
                "what was chosen: {selection.paths: composable_sft(selection)}."
            )
        mask = selection.chosen[path]
        if mask.shape != array.shape or (path in now and now[path].shape != array.shape):
            raise StructureError(
                f"{path}: composable_sft: has shape {array.shape}, and {mask.shape} in the selection; choose from "
                "this tree."
            )

        def init(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> SparseDelta:
            del stats
            with jax.ensure_compile_time_eval():  # the choice is known, also where the array is abstract
                indices = positions_of(np.asarray(flat_entries(jnp.asarray(mask), role)))
            wide = wide_dtype(array.dtype)
            values = hidden_zeros(key, indices.shape, wide)
            if path in now:
                values = entries_at(now[path].astype(wide) - array.astype(wide), jnp.asarray(indices), role)
            return SparseDelta(
                base=array,
                indices=jnp.asarray(indices),
                values=values,
                mode="add",
                keep_formed=keep_formed,
                role=role,
                dtype=array.dtype,
                trainable=("values",),
            )

        return init

    def plan(key: jax.Array, leaves: Mapping[str, Leaf]) -> Mapping[str, InitFn]:
        del key
        return {path: of(path, leaf.array) for path, leaf in leaves.items()}

    def alone(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Any:
        raise PatternError("composable_sft looks arrays up by path; use it as the method of a rule of sj.adapt.")

    return Method("composable_sft", alone, plan=plan)


class Ticket(NamedTuple):
    """Result of `lottery_ticket`: the tree with the trained additions, and their entries.

    Attributes:
      adapted: the tree on \\(\\theta_s\\) with trained additions, and the head.
      selection: the chosen entries.
    """

    adapted: Params
    selection: Selection


def lottery_ticket(
    params: Params,
    train: Callable[[Params, str], Params],
    count: int,
    *,
    maskable: str | Sequence[str],
    head: str | None = None,
    rounds: int = 1,
    key: jax.Array,
    roles: Mapping[str, Role] | None = None,
) -> Ticket:
    r"""Finds entries by full fine-tuning, goes back to the start, and trains these alone.

    Each of \(n\) rounds trains everything from where it began, chooses \(\lfloor K / n \rfloor\) further entries by
    their change from \(\theta_s\), goes back to where the round began, the head too, and trains the entries chosen so
    far. The first phase is dense: its gradients, moments and copies are those of full fine-tuning; only the second is
    sparse.

    Args:
      params: \(\theta_s\): the pretrained model for a language; with the source language's vector applied for a task.
      train: `train(adapted, phase)`, which trains what learns with a new optimizer, schedule and order of data and
        returns the tree; the phase is "full" or "sparse". A training that keeps its best checkpoint returns that.
      count: \(K\).
      maskable: globs of the arrays that may be masked; see `select_changed`. The head is left out of them.
      head: a glob of the task's head, which learns in both phases; None without.
      rounds: \(n\); 1 in published runs.
      key: a random key; consumed.
      roles: how the model uses the arrays.

    Returns:
      A `Ticket`: the tree that the last round trained, and the chosen entries.

    Raises:
      RankError: `rounds` is not a positive integer, `count` is negative, or there are fewer entries to choose from.
      PatternError: a glob of `maskable`, or `head`, matches nothing.
      StructureError: the tree that `train` returned lacks an array, or has one of another shape.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> sft = sj.methods.composable_sft
      >>> goal = jnp.array([3.0, 0.0, 1.0])
      >>> loss = lambda tree, _: jnp.sum((sj.merge(tree)["w"] - goal) ** 2)
      >>> train = lambda tree, phase: sj.training.scan_steps(loss, optax.sgd(0.4), tree, steps=20).adapted
      >>> found = sft.lottery_ticket({"w": jnp.zeros(3)}, train, 1, maskable="w", key=jax.random.key(0))
      >>> [round(v, 3) for v in sj.merge(found.adapted)["w"].tolist()]
      [3.0, 0.0, 0.0]
    """
    rounds = check_int("lottery_ticket: rounds", rounds)
    paths = tuple(p for p in maskable_arrays(params, maskable) if head is None or not matches(head, p))
    heads = {} if head is None else {head: full()}
    current, chosen = params, None
    adapted = params
    for _ in range(rounds):
        dense = adapt(current, {**heads, paths: full()}, key=key, roles=roles)
        after = merge(train(dense, "full"))
        chosen = select_changed(params, after, count // rounds, maskable=paths, already=chosen)
        start = _with_heads(params, current, paths)
        sparse = {**heads, paths: composable_sft(chosen, current=current)}
        adapted = train(adapt(start, sparse, key=key, roles=roles), "sparse")
        current = merge(adapted)
    return Ticket(adapted, chosen if chosen is not None else Selection({}))


def _with_heads(params: Params, current: Params, paths: Sequence[str]) -> Params:
    """The start of the arrays that are masked, and what others are now."""
    now, masked = dict(leaves_with_paths(current)), set(paths)
    return map_with_paths(lambda path, v: v if path in masked else now[path], params)


def distance(adapted: Params, total: int, start: Params | None = None) -> jax.Array:
    r"""Returns \(\frac1N \sum |\theta - \theta_s|\) over what learns, whose gradient is 0 where nothing moved.

    Args:
      adapted: a tree with `SparseDelta` weights whose additions count, and `Full` weights.
      total: \(N\), the number of all scalars of the model (an untied output embedding included).
      start: \(\theta_s\), a tree of arrays, for `Full` weights; without, these do not count.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> tree = sj.adapt({"w": jnp.ones(4)}, {"w": sj.full()}, key=jax.random.key(0))
      >>> float(distance(tree, 2, {"w": jnp.zeros(4)}))
      2.0
    """
    known = {} if start is None else dict(leaves_with_paths(start))
    found = jnp.zeros((), jnp.float32)
    for path, weight in leaves_with_paths(adapted):
        if isinstance(weight, SparseDelta) and weight.mode == "add":
            found = found + _absolute(weight.values)
        elif is_weight(weight) and path in known:
            value = weight.materialize()
            found = found + _absolute(value.astype(jnp.float32) - known[path].astype(jnp.float32))
    return found / total


def _absolute(values: jax.Array) -> jax.Array:
    """The sum of magnitudes; the sign of 0 is 0."""
    return jnp.sum(values * jax.lax.stop_gradient(jnp.sign(values)))
