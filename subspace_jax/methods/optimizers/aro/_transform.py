"""Steepest descent in coordinates that are rotated anew at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import Role, StructureError, check_choice, check_int, matches
from subspace_jax.linalg import whole_matrices, wide_matmul
from subspace_jax.methods.optimizers.aro._bases import Base, stateless
from subspace_jax.methods.optimizers.aro._rotation import Factorization, orthogonal_factor
from subspace_jax.optim import MatrixStep, Parts, scale_matrices, with_rate

Side = Literal["in", "out"]
# The group of a leaf by its path, such as its layer; None for one with a rotation of its own.
GroupFn = Callable[[str], str | None]


def scale_by_aro(
    *,
    base: Base = "sinkhorn",
    beta: float = 0.95,
    passes: int = 5,
    simultaneous: bool = False,
    sides: Mapping[str, Side] | None = None,
    group_fn: GroupFn | None = None,
    factorization: Factorization = "householder",
    rms: float = 0.2,
    largest: int = 8192,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformation:
    r"""Runs a rule of normed steepest descent in coordinates rotated to where it descends fastest.

    \(M \leftarrow \beta M + (1 - \beta) G\), \(D = f(R^T M)\), \(R \leftarrow\) the orthogonal factor of \(M D^T\), and
    the update is \(R\,f(R^T M)\), scaled to a root mean square of 0.2. \(R\) is square, on the side that `sides` names,
    the shorter one by default. The rate at which \(f\) descends is \(\langle M, R f(R^T M) \rangle\): with \(D\) held
    fixed the best rotation is the polar factor of \(M D^T\); the publication takes the QR factor, which noise moves
    less. State is the momentum and the rotation, with "adam" the second moment too. What is no matrix has Adam.

    Args:
      base: \(f\): "sinkhorn" (rows and columns of equal norms), "row", "sign" or "adam".
      beta: decay of the momentum.
      passes: of "sinkhorn".
      simultaneous: a reading of "sinkhorn" that scales both sides at once.
      sides: which side of a kernel is rotated, by path or glob: "in" or "out". The publication rotates the side of the
        residual stream: "in" of what reads it, "out" of what writes to it. A side longer than the other gives a matrix
        \(M D^T\) of lower rank; the shorter one if not named.
      group_fn: the group of each matrix by its path, such as its layer: matrices of a group have one rotation, from the
        sum of their \(M D^T\), which is that of their momenta side by side. None for a rotation of its own.
      factorization: "householder", or "cholesky" by products alone.
      rms: root mean square of the update.
      largest: matrices with a longer side than this, as embeddings, have Adam.
      b1: decay of the first moment of Adam, for what is no matrix.
      b2: decay of the second moment of Adam, also of `base="adam"`.
      eps: added to the root of the second moment.
      roles: how the model uses plain arrays with more than two axes.

    Returns:
      A transformation that keeps structure, shapes and dtypes. With `optax.inject_hyperparams` name `passes`,
      `simultaneous` and `largest` in `static_args`.

    Raises:
      ValueError: an unknown `base`, `factorization` or side.
      StructureError: at the first update, matrices of one group whose rotated sides or stacks differ.
      RankError: `passes` is not a positive integer.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> optimizer = sj.methods.aro.scale_by_aro()
      >>> w = {"w": jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])}
      >>> updates, _ = optimizer.update(w, optimizer.init(w))
      >>> round(float(jnp.sqrt(jnp.mean(updates["w"] ** 2))), 4)
      0.2
    """
    check_int("scale_by_aro: passes", passes)
    check_choice("scale_by_aro: factorization", factorization, ("householder", "cholesky"))
    for side in (sides or {}).values():
        check_choice("scale_by_aro: sides", side, ("in", "out"))
    rule = stateless(base, passes, simultaneous)

    def is_turned(path: str, shape: tuple[int, ...]) -> bool:
        """Whether outputs are rotated."""
        named = next((side for pattern, side in (sides or {}).items() if matches(pattern, path)), None)
        return shape[-2] > shape[-1] if named is None else named == "out"

    def start(zeros: jax.Array, path: str) -> Parts:
        side = zeros.shape[-1 if is_turned(path, zeros.shape) else -2]
        eye = jnp.broadcast_to(jnp.eye(side, dtype=jnp.float32), (*zeros.shape[:-2], side, side))
        parts = {"momentum": zeros, "rotation": jnp.array(eye)}
        return parts | ({"second": jnp.zeros_like(zeros)} if base == "adam" else {})

    def look_ahead(gradient: jax.Array, parts: Parts, path: str) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The momentum, the same with the rotated side first, and the base rule's direction under the old rotation."""
        turned = is_turned(path, gradient.shape)
        moved = beta * parts["momentum"] + (1 - beta) * gradient
        m = _turned(whole_matrices(moved), turned)
        before = wide_matmul(_transposed(whole_matrices(parts["rotation"])), m)
        if base != "adam":
            return moved, m, rule(before)
        second = _turned(whole_matrices(parts["second"]), turned)
        return moved, m, before / (jnp.sqrt(b2 * second + (1 - b2) * before**2) + eps)

    def together(found: Mapping[str, tuple[jax.Array, Parts]]) -> Mapping[str, Parts]:
        """Sums of the matrices from which each group's rotation is made."""
        groups: dict[str, list[str]] = {}
        for path in found:
            if (name := group_fn(path) if group_fn is not None else None) is not None:
                groups.setdefault(name, []).append(path)
        told = {}
        for name, paths in groups.items():
            _, ms, aheads = zip(*(look_ahead(*found[path], path) for path in paths), strict=True)
            _check_group(name, {path: m.shape[:-1] for path, m in zip(paths, ms, strict=True)})
            cross = sum((_cross(m, ahead) for m, ahead in zip(ms, aheads, strict=True)), jnp.zeros(()))
            told |= {path: {"cross": cross} for path in paths}
        return told

    def step(gradient: jax.Array, parts: Parts, at: MatrixStep) -> tuple[jax.Array, Parts]:
        turned = is_turned(at.path, gradient.shape)
        moved, m, ahead = look_ahead(gradient, parts, at.path)
        cross = parts["cross"] if "cross" in parts else _cross(m, ahead)
        rotation = _rotation(cross, whole_matrices(parts["rotation"]), factorization)
        new: Parts = {"momentum": moved, "rotation": rotation}
        after = wide_matmul(_transposed(rotation), m)
        if base == "adam":
            second = b2 * _turned(whole_matrices(parts["second"]), turned) + (1 - b2) * after**2
            direction = after / (jnp.sqrt(second) + eps)
            new["second"] = _turned(second, turned)
        else:
            direction = rule(after)
        update = wide_matmul(rotation, direction)
        size = jnp.linalg.norm(update, axis=(-2, -1), keepdims=True) / math.sqrt(math.prod(update.shape[-2:]))
        return _turned(rms * update / jnp.where(size > 0, size, 1.0), turned), new

    shared = None if group_fn is None else together
    return scale_matrices(start, step, largest=largest, b1=b1, b2=b2, eps=eps, together=shared, roles=roles)


def _check_group(name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a group whose matrices cannot have one rotation."""
    first = next(iter(shapes))
    for path, shape in shapes.items():
        if shape != shapes[first]:
            raise StructureError(
                f"{path}: aro: group {name!r} rotates a side of {shape[-1]} here (stack {shape[:-1]}), but one of "
                f"{shapes[first][-1]} in {first} (stack {shapes[first][:-1]}); name the sides by sides={{...}}, or "
                "let group_fn return another group or None for it."
            )


def _cross(m: jax.Array, ahead: jax.Array) -> jax.Array:
    return wide_matmul(m, _transposed(ahead))


def _rotation(cross: jax.Array, old: jax.Array, factorization: Factorization) -> jax.Array:
    """The new rotation; the old one where there is nothing to turn to."""
    is_zero = jnp.max(jnp.abs(cross), axis=(-2, -1), keepdims=True) == 0
    found = orthogonal_factor(jnp.where(is_zero, jnp.eye(cross.shape[-1], dtype=cross.dtype), cross), factorization)
    return jnp.where(is_zero, old, found)


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -1, -2)


def _turned(matrix: jax.Array, turned: bool) -> jax.Array:
    return _transposed(matrix) if turned else matrix


def aro(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    base: Base = "sinkhorn",
    beta: float = 0.95,
    passes: int = 5,
    simultaneous: bool = False,
    sides: Mapping[str, Side] | None = None,
    group_fn: GroupFn | None = None,
    factorization: Factorization = "householder",
    rms: float = 0.2,
    weight_decay: Any = 0.1,
    largest: int = 8192,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns ARO, steepest descent in rotated coordinates, with its learning rate; see `scale_by_aro`.

    \(W \leftarrow (1 - \eta \lambda) W - \eta\,U\) with a root mean square of \(U\) of 0.2, about that of AdamW's
    direction, so that its learning rate and decay carry over.

    Args:
      learning_rate: \(\eta\), a number or a schedule.
      base: "sinkhorn", "row", "sign" or "adam".
      beta: decay of the momentum.
      passes: of "sinkhorn".
      simultaneous: a reading of "sinkhorn" that scales both sides at once.
      sides: which side of a kernel is rotated, by path or glob.
      group_fn: the group of each matrix by its path; those of one group have one rotation.
      factorization: "householder" or "cholesky".
      rms: root mean square of the update.
      weight_decay: \(\lambda\), of all arrays.
      largest: matrices with a longer side than this have Adam.
      b1: decay of the first moment of Adam, which everything that is no matrix has.
      b2: decay of the second moment of Adam.
      eps: added to the root of the second moment of Adam.
      roles: how the model uses plain arrays with more than two axes.

    Returns:
      A transformation that keeps structure, shapes and dtypes; with weight decay its `update` needs `params`.

    Raises:
      ValueError: an unknown `base`, `factorization` or side; at `update`, `params` is missing for the weight decay.
      RankError: `passes` is not a positive integer.
      StructureError: at the first update, matrices of one group whose rotated sides or stacks differ.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> state = sj.methods.aro.aro(1e-3).init({"w": jnp.ones((6, 4))})
      >>> state[0].matrices["rotation"]["w"].shape
      (4, 4)
    """
    direction = scale_by_aro(
        base=base,
        beta=beta,
        passes=passes,
        simultaneous=simultaneous,
        sides=sides,
        group_fn=group_fn,
        factorization=factorization,
        rms=rms,
        largest=largest,
        b1=b1,
        b2=b2,
        eps=eps,
        roles=roles,
    )
    return with_rate(direction, learning_rate, weight_decay)
