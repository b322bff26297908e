"""LoRA-Pro: changes both factors so that the weight moves as its own gradient would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import StructureError, is_weight, leaves_with_paths, register
from subspace_jax.linalg import whole_matrices, wide_matmul
from subspace_jax.weights import LowRank

__all__ = [
    "Adjusted",
    "LoraProAdamState",
    "Pair",
    "adjust_pair",
    "equivalent_gradient",
    "low_rank_pairs",
    "plain_pair",
    "scale_by_lora_pro",
    "scale_by_lora_pro_adam",
]


class Pair(NamedTuple):
    """Where the two factors of one low-rank addition are.

    Attributes:
      a: index of \\(A\\), `[*stack, in, rank]`, among `jax.tree.leaves` of the trainable tree.
      b: index of \\(B\\), `[*stack, rank, out]`.
      scale: \\(s\\).
    """

    a: int
    b: int
    scale: float


PairFn = Callable[[Any], Sequence[Pair]]


def low_rank_pairs(tree: Any) -> list[Pair]:
    """Returns the factor pairs of every `LowRank` stand-in of a trainable tree, inside other weights too.

    Args:
      tree: the trainable tree of `partition`, or gradients of it.

    Raises:
      StructureError: there is none, or one has only one factor to learn.
    """
    pairs, place = [], 0
    for path, leaf in leaves_with_paths(tree):
        if is_weight(leaf):
            place = _pairs_of(path, leaf, place, pairs)
        else:
            place += 1
    if not pairs:
        raise StructureError("LoRA-Pro: the tree has no LowRank stand-in; adapt it with lora(...) or pissa(...).")
    return pairs


def _pairs_of(path: str, weight: Any, place: int, pairs: list[Pair]) -> int:
    """Enters the pairs of a weight whose first array is at `place`; returns the place after its last."""
    places: dict[str, int] = {}
    for name, value in weight.data_items():
        if is_weight(value):
            place = _pairs_of(path, value, place, pairs)
            continue
        places[name] = place
        place += len(jax.tree.leaves(value))
    # Gains between the factors would make the map from factors to weight another one.
    if type(weight) is LowRank:
        if not {"a", "b"} <= set(places):
            raise StructureError(f"{path}: LoRA-Pro adjusts both factors together; here only {sorted(places)} learn.")
        pairs.append(Pair(places["a"], places["b"], weight.scale))
    return place


class Adjusted(NamedTuple):
    """What LoRA-Pro makes of the gradients of one pair of factors.

    Attributes:
      a: \\(a\\), like \\(A\\), in float32.
      b: \\(b\\), like \\(B\\), in float32.
    """

    a: jax.Array
    b: jax.Array


def adjust_pair(
    a: jax.Array, b: jax.Array, a_gradient: jax.Array, b_gradient: jax.Array, scale: float, *, delta: float = 1e-8
) -> Adjusted:
    r"""Returns the steps of both factors that change the weight most as its own gradient would.

    \(\min_{a, b} \|s\,a B + s\,A b - G\|^2\) with \(g_A = s\,G B^T\), \(g_B = s\,A^T G\) needs no \(G\):
    \(a = \frac{1}{s^2} g_A (B B^T)^{-1} + A X\), \(b = \frac{1}{s^2} (A^T A)^{-1} g_B (I - P_B) - X B\), where \(X\)
    solves \(A^T A\,X + X\,B B^T = -\frac{1}{s^2} A^T g_A (B B^T)^{-1}\), so that the steps stay closest to the
    gradients.
    While \(B = 0\), \(a = g_A\), \(b = \frac{1}{s^2} (A^T A)^{-1} g_B\) and \(X = 0\).

    Args:
      a: \(A\), `[*stack, in, rank]`.
      b: \(B\), `[*stack, rank, out]`.
      a_gradient: \(g_A\).
      b_gradient: \(g_B\).
      scale: \(s\).
      delta: added to the eigenvalues of the Gram matrices before they are inverted.
    """
    plain = plain_pair(a, b, a_gradient, b_gradient, scale, delta=delta)
    a, b, a_gradient = (v.astype(jnp.float32) for v in (a, b, a_gradient))
    a_values, a_vectors = _gram(_transposed(a), a)
    b_values, b_vectors = _gram(b, _transposed(b))
    # The right-hand side is minus A^T times the plain step of A.
    right = -wide_matmul(_transposed(a), plain.a, split=(None, None))
    turned = wide_matmul(wide_matmul(_transposed(a_vectors), right), b_vectors)
    sums = jnp.maximum(a_values[..., :, None] + b_values[..., None, :], delta)
    x = wide_matmul(wide_matmul(a_vectors, turned / sums), _transposed(b_vectors))
    x = jnp.where(_is_first(b_values), 0.0, x)
    return Adjusted(plain.a + wide_matmul(a, x), plain.b - wide_matmul(x, b))


def plain_pair(
    a: jax.Array, b: jax.Array, a_gradient: jax.Array, b_gradient: jax.Array, scale: float, *, delta: float = 1e-8
) -> Adjusted:
    r"""Returns the steps with \(X = 0\): the same change of the weight to first order, for less.

    Args:
      a: as for `adjust_pair`, and so are the others.
    """
    a, b, a_gradient, b_gradient = (v.astype(jnp.float32) for v in (a, b, a_gradient, b_gradient))
    a_values, a_vectors = _gram(_transposed(a), a)
    b_values, b_vectors = _gram(b, _transposed(b))
    first = _is_first(b_values)
    # Inverses of safe values, so that nothing that is thrown away is infinite.
    a_inverse = _inverse(a_values, a_vectors, delta)
    b_inverse = _inverse(jnp.where(first[..., 0], 1.0, b_values), b_vectors, delta)
    a_step = jnp.where(first, a_gradient, wide_matmul(a_gradient, b_inverse) / scale**2)
    inside = wide_matmul(wide_matmul(b_gradient, _transposed(b), split=(None, None)), b_inverse)
    outside = b_gradient - jnp.where(first, 0.0, wide_matmul(inside, b))
    return Adjusted(a_step, wide_matmul(a_inverse, outside) / scale**2)


def equivalent_gradient(a: jax.Array, b: jax.Array, step: Adjusted, scale: float) -> jax.Array:
    r"""Returns \(s\,a B + s\,A b\), how steps of the factors change the weight to first order, in float32.

    Args:
      a: \(A\), `[*stack, in, rank]`.
      b: \(B\), `[*stack, rank, out]`.
      step: steps of both.
      scale: \(s\).
    """
    return scale * (wide_matmul(step.a, b) + wide_matmul(a, step.b))


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -1, -2)


def _gram(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of a product that is symmetric and not negative."""
    gram = wide_matmul(left, right, split=(None, None))
    values, vectors = jnp.linalg.eigh(whole_matrices(gram))
    return jnp.maximum(values, 0.0), vectors


def _inverse(values: jax.Array, vectors: jax.Array, delta: float) -> jax.Array:
    return wide_matmul(vectors / (values + delta)[..., None, :], _transposed(vectors))


def _is_first(b_values: jax.Array) -> jax.Array:
    """Whether B is still zero, `[*stack, 1, 1]`."""
    return jnp.sum(b_values, -1)[..., None, None] <= jnp.finfo(jnp.float32).tiny


def scale_by_lora_pro(delta: float = 1e-8, *, pairs: PairFn = low_rank_pairs) -> optax.GradientTransformation:
    """Replaces the gradients of LoRA's factors by LoRA-Pro's steps; see `adjust_pair`.

    Chain a learning rate after it. In front of it only scalars may act on the gradients (no Adam, no clipping by leaf):
    the formulas need the true ones. Other leaves pass as they are; give them another optimizer by `optax.partition`.

    Args:
      delta: damping of inverses.
      pairs: finds the factors in a tree; those of `LowRank` stand-ins if not given.

    Returns:
      A transformation without state whose `update` needs `params`.

    Raises:
      StructureError: at `init`, the tree has no pair of factors.
      ValueError: `update` without `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> trainable, _ = sj.partition(adapted)
      >>> optimizer = optax.chain(sj.methods.lora_pro.scale_by_lora_pro(), optax.scale_by_learning_rate(1e-2))
      >>> updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
      >>> updates["w"].b.shape
      (2, 4)
    """

    def init(params: Any) -> optax.EmptyState:
        pairs(params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        gradients, treedef, values = _leaves(updates, params)
        for group in _groups(pairs(updates), values):
            factors = _stacked(group, values)
            step = adjust_pair(*factors, *_stacked(group, gradients), group[0].scale, delta=delta)
            _put(group, step, gradients)
        return jax.tree.unflatten(treedef, gradients), state

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
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, delta: float = 1e-8, *, pairs: PairFn = low_rank_pairs
) -> optax.GradientTransformation:
    r"""LoRA-Pro with Adam: the equivalent gradient is preconditioned in weight space, then turned into factor steps.

    The moments are as large as full fine-tuning's, \(2\,d_{in} d_{out}\) values for each weight: what is saved is the
    size of the adapter, not the optimizer's memory. Chain a learning rate, and `optax.add_decayed_weights` before it.

    Args:
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to the root of the second.
      delta: damping of inverses.
      pairs: as for `scale_by_lora_pro`.

    Returns:
      A transformation whose `update` needs `params`; other leaves pass as they are.

    Raises:
      StructureError: at `init`, the tree has no pair of factors.
      ValueError: `update` without `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> trainable, _ = sj.partition(sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(2)}, key=jax.random.key(0)))
      >>> sj.methods.lora_pro.scale_by_lora_pro_adam().init(trainable).mu[0].shape
      (1, 6, 4)
    """

    def init(params: Any) -> LoraProAdamState:
        leaves = jax.tree.leaves(params)

        def moment(group: Sequence[Pair]) -> jax.Array:
            # By products of zeros, so that it lies on the devices as the weights do.
            return wide_matmul(*(jnp.zeros_like(v) for v in _stacked(group, leaves)))

        found = _groups(pairs(params), leaves)
        return LoraProAdamState(jnp.zeros((), jnp.int32), tuple(map(moment, found)), tuple(map(moment, found)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, LoraProAdamState]:
        gradients, treedef, values = _leaves(updates, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        moments = []
        for group, mu, nu in zip(_groups(pairs(updates), values), state.mu, state.nu, strict=True):
            scale, (a, b) = group[0].scale, _stacked(group, values)
            raw = plain_pair(a, b, *_stacked(group, gradients), scale, delta=delta)
            change = equivalent_gradient(a, b, raw, scale)
            mu = b1 * mu + (1 - b1) * change
            nu = b2 * nu + (1 - b2) * change * change
            direction = (mu / (1 - b1**count)) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
            a_gradient = scale * wide_matmul(direction, _transposed(b), split=(-2, None))
            b_gradient = scale * wide_matmul(_transposed(a), direction, split=(None, -1))
            _put(group, adjust_pair(a, b, a_gradient, b_gradient, scale, delta=delta), gradients)
            moments.append((mu, nu))
        state = LoraProAdamState(count, tuple(m for m, _ in moments), tuple(v for _, v in moments))
        return jax.tree.unflatten(treedef, gradients), state

    return optax.GradientTransformation(init, update)


def _leaves(updates: Any, params: Any) -> tuple[list[jax.Array], Any, list[jax.Array]]:
    if params is None:
        raise ValueError("LoRA-Pro needs the factors themselves: call update(gradients, state, params).")
    gradients, treedef = jax.tree.flatten(updates)
    return gradients, treedef, jax.tree.leaves(params)


def _groups(pairs: Sequence[Pair], values: Sequence[jax.Array]) -> list[list[Pair]]:
    """Pairs of equal shapes, scales and layouts together, so that layers are computed at once."""
    groups: dict[Any, list[Pair]] = {}
    for one in pairs:
        kinds = ((v.shape, v.dtype, jax.typeof(v).sharding) for v in (values[one.a], values[one.b]))
        groups.setdefault((*kinds, one.scale), []).append(one)
    return list(groups.values())


def _stacked(group: Sequence[Pair], values: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return jnp.stack([values[one.a] for one in group]), jnp.stack([values[one.b] for one in group])


def _put(group: Sequence[Pair], step: Adjusted, gradients: list[jax.Array]) -> None:
    """Writes the steps of a group in the gradients' places."""
    for i, one in enumerate(group):
        gradients[one.a] = step.a[i].astype(gradients[one.a].dtype)
        gradients[one.b] = step.b[i].astype(gradients[one.b].dtype)


register(
    __name__,
    title="LoRA-Pro: Are Low-Rank Adapters Properly Optimized?",
    authors="Wang, Liang, He, Wang, Tan",
    year=2025,
    kinds=("transformation",),
)
