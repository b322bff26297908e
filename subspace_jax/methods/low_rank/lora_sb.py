"""LoRA-SB and LoRA-XS: train a small core between two frozen factors."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import (
    Method,
    OptState,
    Params,
    Role,
    StructureError,
    Updates,
    check_choice,
    check_int,
    check_number,
    check_rank,
    leaves_with_paths,
    map_with_paths,
    register,
    require_matrix,
)
from subspace_jax.linalg import SVD, randomized_svd, truncated_svd, wide_dtype
from subspace_jax.optim import is_hole
from subspace_jax.weights import LowRankCore, lora_scale

__all__ = [
    "LoraSbState",
    "lora_sb",
    "lora_xs",
    "scale_by_lora_sb",
]


# Up to this smaller side a full decomposition is quick.
EXACT_UP_TO = 2048


def lora_xs(
    rank: int,
    *,
    alpha: float | None = None,
    factors: Literal["svd", "random"] = "svd",
    noise: float = 1e-5,
    iterations: int = 10,
) -> Method:
    r"""Trains an \(r \times r\) core between the leading singular directions of a frozen weight.

    \(W + s\,P R Q\) with \(W \approx U_r S_r V_r^T\), \(P = U_r S_r\), \(Q = V_r^T\), and \(R\) small noise at the
    start.

    Args:
      rank: \(r\), at most the weight's smaller side.
      alpha: \(s = \alpha / r\); `rank` if None.
      factors: "svd", or "random" for factors drawn as LoRA's are, the authors' ablation.
      noise: standard deviation of \(R\) at the start.
      iterations: power iterations of the randomized decomposition.

    Returns:
      A method whose weights are `LowRankCore` with a core `[*stack, rank, rank]`.

    Raises:
      RankError: `rank` is above the weight's smaller side; raised by `adapt`, with the path.
      RoleError: an array is not known to be a matrix; likewise.
      RankError: `rank` is not a positive integer, or `iterations` is negative.
      ValueError: `factors` is unknown, `alpha` is not a positive number, or `noise` is negative.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jax.random.normal(jax.random.key(1), (6, 4))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.methods.lora_sb.lora_xs(rank=2)}, key=jax.random.key(0))
      >>> sj.summary(adapted).trainable
      4

    References:
      Balazy, Banaei, Aberer, Tabor, LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, 2024.
    """
    rank, scale, iterations = _checked("lora_xs", rank, alpha, iterations)
    check_choice("lora_xs: factors", factors, ("svd", "random"))
    check_number("lora_xs: noise", noise, least=0.0)

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> LowRankCore:
        del stats
        require_matrix(array, role)
        inputs, outputs = role.sizes(array.shape)
        check_rank(rank, min(inputs, outputs))
        stack = role.stack_shape(array.shape)
        key_core, key_left, key_right = jax.random.split(key, 3)
        if factors == "svd":
            matrix = role.matrix(array).astype(wide_dtype(array.dtype))
            found = randomized_svd(key_left, matrix, rank, iterations=iterations)
            left, right = found.u * found.s[..., None, :], found.vt
        else:
            left = _uniform(key_left, (*stack, inputs, rank), inputs)
            right = _uniform(key_right, (*stack, rank, outputs), rank)
        core = noise * jax.random.normal(key_core, (*stack, rank, rank), jnp.float32)
        return _core_weight(array, role, left, core, right, scale)

    return Method("lora_xs", make)


def lora_sb(
    rank: int,
    *,
    learning_rate: float,
    alpha: float | None = None,
    update: Literal["sign", "raw"] = "sign",
    iterations: int = 10,
) -> Method:
    r"""Trains an \(r \times r\) core whose factors and start approximate the first step of full fine-tuning.

    With the gradient \(G\) that `capture` averaged: \(\Delta W = -\eta_1\,\mathrm{sign}(G)\), as the first AdamW step
    would do, \(\Delta W \approx U S V^T\), \(P = U_r\), \(Q = V_r^T\), \(R = S_r / s\). The model starts one
    approximate step away from \(W\).

    Args:
      rank: \(r\), at most the weight's smaller side.
      learning_rate: \(\eta_1\), the first learning rate of the schedule (not its peak).
      alpha: \(s = \alpha / r\); `rank` if None.
      update: "sign", or "raw" for \(\Delta W = -\eta_1 G\), the first step of SGD.
      iterations: power iterations where a side is above 2048 and the decomposition is randomized.

    Returns:
      A method that needs the statistic "gradient", whose weights are `LowRankCore`.

    Raises:
      RankError: `rank` is above the weight's smaller side; raised by `adapt`, with the path.
      StatisticsError: gradients were not captured; raised by `adapt`, with the path.
      RoleError: an array is not known to be a matrix; likewise.
      RankError: `rank` is not a positive integer, or `iterations` is negative.
      ValueError: `update` is unknown, or `learning_rate` or `alpha` is not a positive number.

    Warning:
      Where a gradient is exactly zero (an unused expert) the factors are arbitrary and the core is zero; `adapt` warns.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params, x = {"w": jnp.ones((6, 4))}, jax.random.normal(jax.random.key(0), (8, 6))
      >>> loss = lambda p, x: jnp.mean((x @ p["w"] - 1.0) ** 2)
      >>> stats = sj.capture(loss, params, [x], statistics=("gradient",))
      >>> rules = {"w": sj.lora_sb(rank=2, learning_rate=1e-3)}
      >>> adapted = sj.adapt(params, rules, key=jax.random.key(1), stats=stats)
      >>> bool(loss(sj.merge(adapted), x) < loss(params, x))
      True
    """
    rank, scale, iterations = _checked("lora_sb", rank, alpha, iterations)
    check_choice("lora_sb: update", update, ("sign", "raw"))
    check_number("lora_sb: learning_rate", learning_rate, above=0.0)

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> LowRankCore:
        require_matrix(array, role)
        smaller = min(role.sizes(array.shape))
        check_rank(rank, smaller)
        gradient = role.matrix(stats.gradient)
        _warn_of_no_gradient(gradient, array.shape)
        step = -learning_rate * (jnp.sign(gradient) if update == "sign" else gradient)
        if smaller <= EXACT_UP_TO:
            found: SVD = truncated_svd(step, rank)
        else:
            found = randomized_svd(key, step, rank, iterations=iterations)
        core = found.s[..., :, None] * jnp.eye(rank, dtype=found.s.dtype) / scale
        return _core_weight(array, role, found.u, core, found.vt, scale)

    return Method("lora_sb", make, needs=("gradient",))


class LoraSbInverses(NamedTuple):
    r"""Inverse Gram matrices of the factors of one weight.

    Attributes:
      left: \(\frac{1}{s^2} (P^T P)^{-1}\), `[*stack, rank, rank]` in float32.
      right: \((Q Q^T)^{-1}\), likewise.
    """

    left: jax.Array
    right: jax.Array


class LoraSbState(NamedTuple):
    """State of `scale_by_lora_sb`.

    Attributes:
      inverses: `LoraSbInverses` by path of the weight.
    """

    inverses: dict[str, Any]


def scale_by_lora_sb(adapted: Params) -> optax.GradientTransformation:
    r"""Rescales gradients of cores so that their steps are projections of steps along the full gradient.

    \(\frac{1}{s^2} (P^T P)^{-1} G_R (Q Q^T)^{-1}\), so that \(s P (\cdot) Q\) is the projection of the full gradient on
    the directions that a core can reach. For orthonormal factors and \(s = 1\), as LoRA-SB has them, it is the
    identity. The inverses are made once, and are its state; gradients of everything but full cores pass unchanged.

    Args:
      adapted: the whole adapted tree, frozen factors included; the transformation itself runs on the trainable tree,
        or a part of it.

    Returns:
      A gradient transformation that keeps structure, shapes and dtypes.

    Raises:
      StructureError: no weight of the tree is a `LowRankCore` with a full core.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> w = jax.random.normal(jax.random.key(1), (6, 4))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.methods.lora_sb.lora_xs(rank=2)}, key=jax.random.key(0))
      >>> trainable, frozen = sj.partition(adapted)
      >>> optimizer = optax.chain(sj.methods.lora_sb.scale_by_lora_sb(adapted), optax.sgd(0.1))
      >>> updates, state = optimizer.update(trainable, optimizer.init(trainable))
      >>> updates["w"].core.shape
      (2, 2)
    """

    cores = {
        path: weight
        for path, weight in leaves_with_paths(adapted)
        if isinstance(weight, LowRankCore) and weight.core.ndim == weight.left.ndim
    }

    if not cores:
        raise StructureError(
            "scale_by_lora_sb: no weight of the tree is a LowRankCore with a full core. Give the whole tree that "
            "sj.adapt made with lora_sb or lora_xs; inside another weight, such as DoRA's, other steps are the closest."
        )

    def inverses(weight: LowRankCore) -> LoraSbInverses:
        left, right = weight.left.astype(jnp.float32), weight.right.astype(jnp.float32)
        return LoraSbInverses(
            _ridge_inverse(_product(jnp.swapaxes(left, -1, -2), left)) / weight.scale**2,
            _ridge_inverse(_product(right, jnp.swapaxes(right, -1, -2))),
        )

    def init(params: Params) -> LoraSbState:
        del params
        # By path, so that the state is of no container's kind and is the same in a part of the tree.
        return LoraSbState({path: inverses(weight) for path, weight in cores.items()})

    def update(updates: Updates, state: OptState, params: Params = None) -> tuple[Updates, OptState]:
        del params

        def one(path: str, gradient: Any) -> Any:
            found = state.inverses.get(path)
            if found is None or not isinstance(gradient, LowRankCore) or is_hole(gradient.core):
                return gradient
            core = _product(_product(found.left, gradient.core), found.right).astype(gradient.core.dtype)
            return dataclasses.replace(gradient, core=core)

        return map_with_paths(one, updates), state

    return optax.GradientTransformation(init, update)


def _checked(name: str, rank: Any, alpha: Any, iterations: Any) -> tuple[int, float, int]:
    """Rank, scale and iterations."""
    rank = check_rank(rank, what=f"{name}: rank")
    scale = lora_scale(rank, alpha, what=f"{name}: alpha")
    return rank, scale, check_int(f"{name}: iterations", iterations, least=0)


def _warn_of_no_gradient(gradient: jax.Array, shape: tuple[int, ...]) -> None:
    """Warns of a matrix whose gradient is zero throughout, where values are known."""
    try:
        nothing = int(jnp.sum(~jnp.any(gradient != 0, axis=(-2, -1))))
    except jax.errors.ConcretizationTypeError:
        return
    if nothing:
        which = "its gradient" if gradient.ndim == 2 else f"the gradient of {nothing} of its layers"
        warnings.warn(
            f"lora_sb: in a weight of shape {shape} {which} is exactly zero, so the factors are arbitrary and the core "
            "starts at zero. The loss does not depend on it for the captured data: capture other batches, or leave the "
            "weight out of the rule.",
            stacklevel=2,
        )


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _ridge_inverse(gram: jax.Array) -> jax.Array:
    """Inverse by Cholesky, with a ridge of 1e-8 of the mean eigenvalue."""
    rank = gram.shape[-1]
    eye = jnp.eye(rank, dtype=gram.dtype)
    ridge = 1e-8 * jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / rank
    factor = jnp.linalg.cholesky(gram + ridge * eye)
    return jax.scipy.linalg.cho_solve((factor, True), jnp.broadcast_to(eye, gram.shape))


def _uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _core_weight(
    array: jax.Array, role: Role, left: jax.Array, core: jax.Array, right: jax.Array, scale: float
) -> LowRankCore:
    return LowRankCore(
        base=array,
        left=left,
        core=core,
        right=right,
        scale=scale,
        role=role,
        dtype=array.dtype,
        trainable=("core",),
    )


register(
    __name__,
    title="Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
    authors="Ponkshe, Singhal et al.",
    year=2024,
    kinds=("weight", "transformation"),
    use_for="Very few trained values, with a gradient of your task to start from.",
    not_for=(
        "There are no batches before training: `lora_xs` starts from the weight alone, and is the weaker one "
        "where the change is far from the weight's own directions."
    ),
)
