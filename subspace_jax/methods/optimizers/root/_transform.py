"""Outliers clipped off the momentum, and what is left orthogonalized by coefficients of its size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import Role, check_choice, check_int
from subspace_jax.linalg import magnitude_quantile, newton_schulz, whole_matrices
from subspace_jax.methods.optimizers.root._coefficients import Table, coefficients_for
from subspace_jax.optim import MatrixStep, Parts, map_matrices, scale_matrices, with_rate

Quantile = Literal["exact", "approximate"]
SAMPLED = 65536
_FLOOR = 1e-9


def scale_by_root(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    quantile: float = 0.9,
    quantile_method: Quantile = "exact",
    table: Table = "calibrated",
    safe: bool = True,
    steps: int = 5,
    rms: float = 0.2,
    largest: int = 32000,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformation:
    r"""Orthogonalizes the momentum without its outliers, by Newton-Schulz steps with coefficients of the matrix's size.

    \(M \leftarrow \mu M + G\), \(N = G + \mu M\), \(B = N\) clipped at the quantile of its entries' sizes, and the
    update is \(0.2 \sqrt{\max(in, out)}\,\mathrm{NS}(B)\), whose root mean square is about that of AdamW's. The
    momentum itself is not clipped. State is the momentum alone, half of Adam's. Everything that is no matrix has Adam.

    Args:
      momentum: \(\mu\).
      nesterov: \(N = G + \mu M\), as the published code; else \(N = M\), as its pseudo-code.
      quantile: share of a matrix's entries that are kept as they are; 1 clips nothing, which is Muon.
      quantile_method: "exact" counts all entries; "approximate" every so many of a matrix with more than 65,536.
      table: coefficients: "calibrated" for the size, "published" for the sizes of a model of 10^9 parameters and
        Muon's elsewhere, or "muon".
      safe: take Muon's in place of a published triple that lets some singular values end above 1.5.
      steps: of Newton-Schulz.
      rms: the factor 0.2.
      largest: matrices with a longer side than this, as embeddings, have Adam.
      b1: decay of the first moment of Adam.
      b2: decay of its second moment.
      eps: added to the root of its second moment.
      roles: how the model uses plain arrays with more than two axes.

    Returns:
      A transformation that keeps structure, shapes and dtypes. With `optax.inject_hyperparams` name `nesterov`, `safe`,
      `steps` and `largest` in `static_args`.

    Raises:
      ValueError: an unknown `table` or `quantile_method`.
      RankError: `steps` is not a positive integer.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> optimizer = sj.methods.root.scale_by_root(rms=1.0)
      >>> w = {"w": jnp.diag(jnp.array([3.0, 1.0]))}
      >>> updates, _ = optimizer.update(w, optimizer.init(w))
      >>> bool(jnp.allclose(updates["w"] / jnp.sqrt(2), jnp.eye(2), atol=0.3))
      True
    """
    check_int("scale_by_root: steps", steps)
    check_choice("scale_by_root: table", table, ("calibrated", "published", "muon"))
    check_choice("scale_by_root: quantile_method", quantile_method, ("exact", "approximate"))

    def step(gradient: jax.Array, parts: Parts, at: MatrixStep) -> tuple[jax.Array, Parts]:
        del at
        moved = momentum * parts["momentum"] + gradient
        seen = gradient + momentum * moved if nesterov else moved
        kept = clip_entries(seen, quantile, quantile_method)
        factor = rms * math.sqrt(max(gradient.shape[-2:]))
        return factor * _orthogonalized(kept, table, safe, steps), {"momentum": moved}

    return scale_matrices(
        lambda zeros, path: {"momentum": zeros}, step, largest=largest, b1=b1, b2=b2, eps=eps, roles=roles
    )


def clip_entries(matrix: jax.Array, quantile: Any, method: Quantile = "exact") -> jax.Array:
    r"""Returns a matrix with its largest entries cut at \(\epsilon\): \(N - \mathrm{soft}(N, \epsilon)\).

    \(\epsilon\) is the quantile of the sizes of this matrix's entries, and 1e-9 on top; each of a stack has its own.
    The subtraction is kept as published: with more zeros than the quantile \(\epsilon\) is 1e-9, and a large entry less
    its soft part is 0 in float32.

    Args:
      matrix: `[*stack, in, out]`.
      quantile: share of entries that stay as they are.
      method: "exact", or "approximate" from every so many entries of a large matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> clip_entries(jnp.array([[1.0, -2.0], [3.0, -100.0]]), 2 / 3).tolist()
      [[1.0, -2.0], [3.0, -3.0]]
    """
    size = math.prod(matrix.shape[-2:])
    if method == "approximate" and size > SAMPLED:
        entries = whole_matrices(matrix).reshape(*matrix.shape[:-2], 1, size)
        # A stride without a common factor with the sides visits all rows and columns.
        bound = magnitude_quantile(entries[..., :: size // SAMPLED | 1], quantile)
    else:
        bound = magnitude_quantile(matrix, quantile)
    bound = bound[..., None, None] + _FLOOR
    soft = jnp.sign(matrix) * jnp.maximum(jnp.abs(matrix) - bound, 0.0)
    return jnp.where(jnp.asarray(quantile) < 1, matrix - soft, matrix)


def _orthogonalized(matrix: jax.Array, table: Table, safe: bool, steps: int) -> jax.Array:
    inputs, outputs = matrix.shape[-2:]
    return newton_schulz(matrix, (coefficients_for((inputs, outputs), table, safe),) * steps)


def clip_by_quantile(
    quantile: float = 0.9, *, method: Quantile = "exact", roles: Mapping[str, Role] | None = None
) -> optax.GradientTransformation:
    """Cuts the largest entries of every matrix at a quantile of their sizes; see `clip_entries`. Other arrays stay.

    Args:
      quantile: share of a matrix's entries that stay as they are.
      method: "exact" or "approximate".
      roles: how the model uses plain arrays with more than two axes.

    Raises:
      ValueError: an unknown `method`.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> optimizer = optax.chain(optax.trace(0.95), sj.methods.root.clip_by_quantile(0.9), optax.scale(-0.1))
    """
    check_choice("clip_by_quantile: method", method, ("exact", "approximate"))
    return _stateless(lambda matrix, view: clip_entries(matrix, quantile, method), roles)


def orthogonalize(
    *, table: Table = "calibrated", safe: bool = True, steps: int = 5, roles: Mapping[str, Role] | None = None
) -> optax.GradientTransformation:
    """Orthogonalizes every matrix by Newton-Schulz steps with coefficients of its size. Other arrays stay.

    Args:
      table: "calibrated", "published" or "muon".
      safe: take Muon's in place of a published triple that lets some singular values end above 1.5.
      steps: of Newton-Schulz.
      roles: how the model uses plain arrays with more than two axes.

    Raises:
      ValueError: an unknown `table`.
      RankError: `steps` is not a positive integer.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> muon = optax.chain(optax.trace(0.95, nesterov=True), sj.methods.root.orthogonalize(table="muon"))
    """
    check_choice("orthogonalize: table", table, ("calibrated", "published", "muon"))
    check_int("orthogonalize: steps", steps)
    return _stateless(lambda matrix, view: _orthogonalized(matrix, table, safe, steps), roles)


def _stateless(function: Any, roles: Mapping[str, Role] | None) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        del params
        return map_matrices(function, updates, roles)

    return optax.stateless(update)


def root(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    quantile: float = 0.9,
    quantile_method: Quantile = "exact",
    table: Table = "calibrated",
    safe: bool = True,
    steps: int = 5,
    rms: float = 0.2,
    weight_decay: float = 0.1,
    largest: int = 32000,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    roles: Mapping[str, Role] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Returns ROOT, a Muon that outliers do not reach, with its learning rate; see `scale_by_root`.

    \(W \leftarrow (1 - \eta \lambda) W - \eta\,0.2 \sqrt{\max(in, out)}\,\mathrm{NS}(B)\).

    Args:
      learning_rate: \(\eta\), a number or a schedule; 1e-3 as published, under a cosine with 100 steps of warm-up.
      momentum: \(\mu\).
      nesterov: look ahead along the momentum.
      quantile: share of a matrix's entries that are kept as they are.
      quantile_method: "exact" or "approximate".
      table: coefficients: "calibrated", "published" or "muon".
      safe: take Muon's in place of a published triple that lets some singular values end above 1.5.
      steps: of Newton-Schulz.
      rms: the factor 0.2.
      weight_decay: \(\lambda\), of all arrays.
      largest: matrices with a longer side than this, as embeddings, have Adam.
      b1: decay of the first moment of Adam, which everything that is no matrix has.
      b2: decay of the second moment of Adam.
      eps: added to the root of the second moment of Adam.
      roles: how the model uses plain arrays with more than two axes.

    Returns:
      A transformation that keeps structure, shapes and dtypes; with weight decay its `update` needs `params`.

    Raises:
      ValueError: an unknown `table` or `quantile_method`; at `update`, `params` is missing for the weight decay.
      RankError: `steps` is not a positive integer.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> state = sj.methods.root.root(1e-3).init({"w": jnp.ones((6, 4))})
      >>> state[0].matrices["momentum"]["w"].shape
      (6, 4)
    """
    direction = scale_by_root(
        momentum=momentum,
        nesterov=nesterov,
        quantile=quantile,
        quantile_method=quantile_method,
        table=table,
        safe=safe,
        steps=steps,
        rms=rms,
        largest=largest,
        b1=b1,
        b2=b2,
        eps=eps,
        roles=roles,
    )
    return with_rate(direction, learning_rate, weight_decay)
