"""Riemannian SGD on subspaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import optax

from subspace_jax.core import check_choice
from subspace_jax.manifolds import Grassmann
from subspace_jax.optim import is_zero, riemannian


def grassmann_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    *,
    paths: str | Sequence[str] | None = None,
    transport: Literal["project", "none"] = "project",
    retraction: Literal["exponential", "qr"] = "exponential",
    renormalize_every: int = 5,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains subspaces by Riemannian SGD with momentum, as published for class subspaces.

    \(V \leftarrow \mu P_S(V) + P_S(G)\) with \(P_S(A) = A - S S^T A\), then along the geodesic: with the thin SVD
    \(V = U \Sigma W^T\), \(S \leftarrow (S W \cos \eta\Sigma - U \sin \eta\Sigma) W^T\). No dampening, no Nesterov, no
    weight decay: that has no meaning for subspaces. Give it the head of `GrassmannHead`, and the backbone
    any other optimizer, in one chain.

    Args:
      learning_rate: \(\eta\), a number or schedule; the authors' is that of the backbone's SGD, and reaches 0.1 beside
        AdamW and 0.3 beside LAMB.
      momentum: \(\mu\).
      paths: globs of the leaves that are subspaces; all of them if None. Others pass as they are.
      transport: "project" is the paper's form above; "none" the authors' code, which sums Euclidean gradients and
        projects their sum. They differ at second order in the step.
      retraction: "exponential" is the method; "qr" is cheaper and first-order.
      renormalize_every: steps from one QR factorization to the next; the authors' 5, and 1 beside AdamW and LAMB. With
        `optax.inject_hyperparams` it is of `static_args`.

    Returns:
      A transformation whose `update` needs `params`; its updates have the dtype of the points.

    Raises:
      ValueError: an unknown option, or `update` without parameters.
      PatternError: a glob matches nothing.
      StructureError: a leaf is not a point of the Grassmannian.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> classes = sj.manifolds.Grassmann().random_point(jax.random.key(0), (3, 6, 2))
      >>> params = {"backbone": jnp.ones((4, 6)), "subspaces": classes}
      >>> optimizer = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     optax.partition({"head": sj.methods.gcr.grassmann_sgd(0.1), "rest": optax.adamw(1e-3)},
      ...                     {"backbone": "rest", "subspaces": "head"}),
      ... )
      >>> updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
      >>> sj.manifolds.Grassmann().check_point(optax.apply_updates(params, updates)["subspaces"])
      True

    References:
      Wang, Li, Zhang, Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class
      Representation, 2023.
    """
    globs = [paths] if isinstance(paths, str) else paths
    check_choice("grassmann_sgd: transport", transport, ("project", "none"))
    check_choice("grassmann_sgd: retraction", retraction, ("exponential", "qr"))
    return riemannian(
        Grassmann() if globs is None else dict.fromkeys(globs, Grassmann()),
        optax.sgd(learning_rate, None if is_zero(momentum) else momentum),
        retraction=retraction,
        transport=transport,
        renormalize_every=renormalize_every,
    )
