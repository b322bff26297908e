"""LoRA-Pro as a gradient transformation, and with Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import OptState, Params, PyTree, StructureError, Updates
from subspace_jax.linalg import wide_matmul
from subspace_jax.methods.optimizers.lora_pro._adjust import Adjusted, adjust_pair, equivalent_gradient, plain_pair
from subspace_jax.methods.optimizers.lora_pro._pair import Pair, PairFn, groups_of, pair_finder, stacked
from subspace_jax.optim import with_rate


def scale_by_lora_pro(
    delta: float = 1e-8, *, adapted: PyTree | None = None, pairs: PairFn | None = None
) -> optax.GradientTransformation:
    """Replaces the gradients of LoRA's factors by LoRA-Pro's steps; see `adjust_pair`.

    Chain a learning rate after it. Before it only scalars may act on the gradients (no Adam, no clipping by leaf):
    the formulas need the true ones. Other leaves pass as they are; give them another optimizer by `optax.partition`.

    Args:
      delta: damping of inverses.
      adapted: the tree that `adapt` returned, or its frozen part, for the scales of the additions.
      pairs: finds the factors and their scales in a tree, in place of `adapted`. With
        `optax.inject_hyperparams` name it in `static_args`, or it is taken for a schedule.

    Returns:
      A transformation without state whose `update` needs `params`. A pair without gradients rests.

    Raises:
      StructureError: at `init`, the tree has no pair of factors, or the scale of one is not known.
      ValueError: `update` without `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> trainable, _ = sj.partition(adapted)
      >>> optimizer = optax.chain(sj.methods.lora_pro.scale_by_lora_pro(adapted=adapted), optax.scale(-1e-2))
      >>> updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
      >>> updates["w"].b.shape
      (2, 4)
    """
    find = pair_finder(adapted, pairs)

    def init(params: Params) -> optax.EmptyState:
        if jax.tree.leaves(params):  # optax initializes with a tree without leaves to tell states from parameters
            find(params)
        return optax.EmptyState()

    def update(updates: Updates, state: OptState, params: Params = None) -> tuple[Updates, OptState]:
        tree = _Factors(updates, params)
        for group in groups_of(find(params), tree.values):
            if live := tree.live(group):
                one = [group[i] for i in live]
                factors, given = stacked(one, tree.values), stacked(one, tree.gradients)
                tree.put(one, adjust_pair(*factors, *given, group[0].scale, delta=delta))
        return tree.updates(), state

    return optax.GradientTransformation(init, update)


class LoraProAdamState(NamedTuple):
    r"""State of `scale_by_lora_pro_adam`.

    Attributes:
      count: steps so far, int32 scalar.
      mu: first moment of the equivalent gradient of every group of pairs of one shape, `[pairs, *stack, in, out]` in
        float32.
      nu: second moment, likewise. Both are as large as the weights themselves.
    """

    count: jax.Array
    mu: tuple[jax.Array, ...]
    nu: tuple[jax.Array, ...]


def scale_by_lora_pro_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    delta: float = 1e-8,
    *,
    adapted: PyTree | None = None,
    pairs: PairFn | None = None,
) -> optax.GradientTransformation:
    r"""Preconditions the equivalent gradient by Adam in weight space, then turns it into LoRA-Pro's factor steps.

    The moments are as large as full fine-tuning's, \(2\,d_{in} d_{out}\) values for each weight: what is saved is the
    size of the adapter, not the optimizer's memory. Chain a learning rate, and `optax.add_decayed_weights` before it.

    Args:
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to the root of the second.
      delta: damping of inverses.
      adapted: the tree that `adapt` returned, or its frozen part, for the scales of the additions.
      pairs: finds the factors and their scales in a tree, in place of `adapted`. With `optax.inject_hyperparams` name
        both in `static_args`.

    Returns:
      A transformation whose `update` needs `params`; other leaves pass as they are. A pair without gradients rests.

    Raises:
      StructureError: at `init`, the tree has no pair of factors, or the scale of one is not known.
      ValueError: `update` without `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(2)}, key=jax.random.key(0))
      >>> trainable, _ = sj.partition(adapted)
      >>> sj.methods.lora_pro.scale_by_lora_pro_adam(adapted=adapted).init(trainable).mu[0].shape
      (1, 6, 4)
    """
    find = pair_finder(adapted, pairs)

    def init(params: Params) -> LoraProAdamState:
        count, leaves = jnp.zeros((), jnp.int32), jax.tree.leaves(params)
        if not leaves:  # of optax, to tell what of a state is like the parameters: nothing here
            return LoraProAdamState(count, *(jnp.zeros((0,)),) * 2)  # pyright: ignore[reportArgumentType]

        def moment(group: Sequence[Pair]) -> jax.Array:
            # By products of zeros, so that it lies on the devices as the weights do.
            return wide_matmul(*(jnp.zeros_like(v) for v in stacked(group, leaves)))

        found = groups_of(find(params), leaves)
        return LoraProAdamState(count, tuple(map(moment, found)), tuple(map(moment, found)))

    def update(updates: Updates, state: OptState, params: Params = None) -> tuple[Updates, LoraProAdamState]:
        tree = _Factors(updates, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        moments = []
        for group, mu, nu in zip(groups_of(find(params), tree.values), state.mu, state.nu, strict=True):
            live = tree.live(group)
            if len(live) == len(group):
                moments.append(one_group(tree, group, mu, nu, count))
            elif live:
                rows = jnp.asarray(live)
                new = one_group(tree, [group[i] for i in live], mu[rows], nu[rows], count)
                moments.append(tuple(old.at[rows].set(v) for old, v in zip((mu, nu), new, strict=True)))
            else:
                moments.append((mu, nu))
        state = LoraProAdamState(count, tuple(m for m, _ in moments), tuple(v for _, v in moments))
        return tree.updates(), state

    def one_group(tree: _Factors, group: Sequence[Pair], mu: jax.Array, nu: jax.Array, count: jax.Array) -> Any:
        scale, (a, b) = group[0].scale, stacked(group, tree.values)
        raw = plain_pair(a, b, *stacked(group, tree.gradients), scale, delta=delta)
        change = equivalent_gradient(a, b, raw, scale)
        mu = b1 * mu + (1 - b1) * change
        nu = b2 * nu + (1 - b2) * change * change
        direction = (mu / (1 - b1**count)) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
        a_gradient = scale * wide_matmul(direction, jnp.swapaxes(b, -1, -2), split=(-2, None))
        b_gradient = scale * wide_matmul(jnp.swapaxes(a, -1, -2), direction, split=(None, -1))
        tree.put(group, adjust_pair(a, b, a_gradient, b_gradient, scale, delta=delta))
        return mu, nu

    return optax.GradientTransformation(init, update)


def lora_pro(
    learning_rate: optax.ScalarOrSchedule,
    *,
    delta: float = 1e-8,
    weight_decay: float = 0.0,
    adapted: PyTree | None = None,
    pairs: PairFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns SGD with LoRA-Pro's steps: \(A \mapsto A - \eta\,a\), \(B \mapsto B - \eta\,b\).

    Rates are those of full fine-tuning. Leaves that are not factors have plain SGD of the same rate.

    Args:
      learning_rate: \(\eta\), a number or a schedule.
      delta: damping of inverses.
      weight_decay: decoupled decay of the factors.
      adapted: the tree that `adapt` returned, or its frozen part, for the scales of the additions.
      pairs: finds the factors and their scales in a tree, in place of `adapted`. With `optax.inject_hyperparams` name
        both in `static_args`.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      StructureError: at `init`, the tree has no pair of factors, or the scale of one is not known.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(2)}, key=jax.random.key(0))
      >>> trainable, _ = sj.partition(adapted)
      >>> optimizer = sj.lora_pro(1e-2, adapted=adapted)
      >>> updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
      >>> updates["w"].a.shape
      (6, 2)
    """
    return with_rate(scale_by_lora_pro(delta, adapted=adapted, pairs=pairs), learning_rate, weight_decay)


def lora_pro_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    delta: float = 1e-8,
    weight_decay: float = 0.0,
    adapted: PyTree | None = None,
    pairs: PairFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns LoRA-Pro with AdamW, the form of all published experiments with language models.

    Published: a rate of 2e-5 with a cosine decay and a warm-up over 3 % of the steps. Moments are as large as full
    fine-tuning's. Leaves that are not factors have plain SGD of the same rate; give them another optimizer.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to the root of the second.
      delta: damping of inverses.
      weight_decay: decoupled decay of the factors; the authors' code applies none.
      adapted: the tree that `adapt` returned, or its frozen part, for the scales of the additions.
      pairs: finds the factors and their scales in a tree, in place of `adapted`. With `optax.inject_hyperparams` name
        both in `static_args`.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      StructureError: at `init`, the tree has no pair of factors, or the scale of one is not known.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(2)}, key=jax.random.key(0))
      >>> trainable, _ = sj.partition(adapted)
      >>> optimizer = sj.methods.lora_pro.lora_pro_adam(2e-5, adapted=adapted)
      >>> updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
      >>> updates["w"].a.shape
      (6, 2)
    """
    return with_rate(
        scale_by_lora_pro_adam(b1, b2, eps, delta, adapted=adapted, pairs=pairs), learning_rate, weight_decay
    )


class _Factors:
    """Gradients and parameters in one order, that of `jax.tree.leaves(params)`."""

    def __init__(self, updates: Updates, params: Params) -> None:
        if params is None:
            raise ValueError("LoRA-Pro needs the factors themselves: call update(gradients, state, params).")
        self._given = updates
        self.values: list[jax.Array] = jax.tree.leaves(params)

        def aligned(gradient: Any, value: Any) -> Any:
            return jax.tree.map(lambda _: _NONE, value) if gradient is None else gradient

        whole = jax.tree.map(aligned, updates, params, is_leaf=lambda v: v is None)
        self.gradients, self._treedef = jax.tree.flatten(whole)

    def live(self, group: Sequence[Pair]) -> list[int]:
        """Which pairs of a group have gradients."""
        found = []
        for i, one in enumerate(group):
            given = [self.gradients[j] is not _NONE for j in (one.a, one.b)]
            if given[0] != given[1]:
                raise StructureError(
                    "LoRA-Pro adjusts both factors together; one factor of a pair has no gradient. Give both "
                    "gradients, or neither."
                )
            if given[0]:
                found.append(i)
        return found

    def put(self, group: Sequence[Pair], step: Adjusted) -> None:
        """Writes the steps of a group in the gradients' places."""
        for i, one in enumerate(group):
            self.gradients[one.a] = step.a[i].astype(self.gradients[one.a].dtype)
            self.gradients[one.b] = step.b[i].astype(self.gradients[one.b].dtype)

    def updates(self) -> Updates:
        """The tree as it was given, with what is written."""
        found = jax.tree.unflatten(self._treedef, self.gradients)
        return jax.tree.map(lambda u, v: None if u is None else v, self._given, found, is_leaf=lambda v: v is None)


# In the place of a gradient that there is none of.
_NONE = object()
