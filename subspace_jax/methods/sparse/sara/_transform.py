"""SaRA's optimizer: Adam on the trained entries, their nuclear norm, and one selection anew of those still small."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax.core import OptState, Params, StructureError, Updates, check_choice, check_int, check_number
from subspace_jax.methods.sparse.sara import _nuclear
from subspace_jax.methods.sparse.sara._method import default_rate
from subspace_jax.methods.sparse.sara._nuclear import PenaltyMode
from subspace_jax.methods.sparse.sara._step import Options, ScaleBySaraState, make_update, value_paths
from subspace_jax.optim import is_zero


def scale_by_sara(
    adapted: Params,
    *,
    threshold: float,
    reselect_after: int | None,
    penalty: float = 5e-3,
    mode: PenaltyMode = "random_one",
    min_side: int = 64,
    min_entries: int = 100,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    reset_moments: bool = True,
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""Returns Adam's direction for the entries that SaRA trains; see `sara_adam`, which adds the rate.

    Args:
      adapted: the tree from `sj.adapt`, whose positions the penalty needs.
      threshold: \(\theta_t\), that of `sara`.
      reselect_after: \(T_p\); None for never.
      penalty: \(\lambda\).
      mode: "random_one" or "all".
      min_side: matrices with a side up to this are left out of the penalty.
      min_entries: a matrix with no more active entries gets no penalty.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay of active entries; none by default, unlike in `sara_adam`.
      reset_moments: whether moments and step count of the entries begin anew after \(T_p\).
      seed: of the draws.

    Returns:
      An optax transformation with the state `ScaleBySaraState`; `update` needs the parameters.

    Raises:
      ValueError: an option is out of range; at `update`, `params` is missing.
      RankError: `reselect_after`, `min_side` or `min_entries` is no integer, or is negative.
      StructureError: at `init`, the values of a weight have another shape than in `adapted`.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.array([0.3, 5.0, 0.1])}, {"w": sj.methods.sara.sara(1.0)}, key=jax.random.key(0))
      >>> transform = scale_by_sara(adapted, threshold=1.0, reselect_after=None)
      >>> learns = sj.partition(adapted)[0]
      >>> updates, _ = transform.update(jax.tree.map(jnp.ones_like, learns), transform.init(learns), learns)
      >>> updates["w"].values.round(3).tolist()
      [1.0, 1.0]
    """
    if threshold != math.inf:
        check_number("sara_adam: threshold", threshold, above=0.0)
    if reselect_after is not None:
        check_int("sara_adam: reselect_after", reselect_after, least=0)
    check_choice("sara_adam: mode", mode, ("random_one", "all"))
    check_number("sara_adam: penalty", penalty, least=0.0)
    for name, value in (("min_side", min_side), ("min_entries", min_entries)):
        check_int(f"sara_adam: {name}", value, least=0)
    options = Options(
        *(np.float32(threshold), reselect_after, penalty, mode, min_side, min_entries),
        *(b1, b2, eps, weight_decay, reset_moments, seed),
    )
    looked_at = {} if is_zero(penalty) else _nuclear.sites(adapted, min_side)
    places = {path: w.indices for path, w in looked_at.items()}
    # Of the weights nothing but shapes and roles is needed: the values that they start with need not stay alive.
    weights = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), _nuclear.chosen(adapted))
    values = {path: w.values for path, w in weights.items()}

    def init(params: Params) -> ScaleBySaraState:
        for path, array in zip(value_paths(params, values), jax.tree.leaves(params), strict=True):
            if path and array.shape != values[path].shape:
                raise StructureError(
                    f"{path}: has values of shape {array.shape}, and {values[path].shape} in the tree that the "
                    "optimizer was made for; make it from the tree that is trained."
                )
        return ScaleBySaraState(
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32),
            optax.tree.zeros_like(params),
            optax.tree.zeros_like(params),
            {path: jnp.ones(v.shape, bool) for path, v in values.items()},
            {path: jnp.copy(v) for path, v in places.items()},  # a donated step may not hold one buffer twice
        )

    def update(updates: Updates, state: OptState, params: Params = None) -> tuple[Updates, OptState]:
        return make_update(options, weights, updates, state, params)

    return optax.GradientTransformation(init, update)


def sara_adam(
    learning_rate: optax.ScalarOrSchedule | None,
    adapted: Params,
    *,
    threshold: float,
    reselect_after: int | None,
    penalty: float = 5e-3,
    mode: PenaltyMode = "random_one",
    min_side: int = 64,
    min_entries: int = 100,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    reset_moments: bool = True,
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""Returns AdamW on SaRA's entries, with a nuclear-norm penalty and a progressive selection.

    To the gradient comes \(\lambda\,(U V^T)_M\), that of \(\lambda \|P \odot M\|_*\). Before update \(T_p + 1\) the
    entries that have grown to the threshold or beyond retire: they keep their value and neither move nor decay again,
    and the penalty looks at the others alone. Shapes stay, and nothing compiles again.

    Arrays in the tree that are not SaRA's (a head) get AdamW as it is. Published: gradients are clipped at norm 1
    before the penalty's is added, `optax.chain(optax.clip_by_global_norm(1.0), sara_adam(...))`, and a cosine schedule.

    Args:
      learning_rate: a number or a schedule; None for the published \(10^{-3}\exp(-350\,\theta_t)\).
      adapted: the tree from `sj.adapt`, whose positions the penalty needs.
      threshold: \(\theta_t\), that of `sara`.
      reselect_after: \(T_p\), published half of all updates; None for never.
      penalty: \(\lambda\): 5e-3 in the paper, 5e-4 in the released command line.
      mode: "random_one", as released: one matrix a step, drawn with equal chances and not multiplied by their number;
        or "all", as the paper writes it, which is so many times stronger, for one decomposition each.
      min_side: matrices with a side up to this are left out, in both modes; 0 for small models. Convolutions and
        vectors are always left out.
      min_entries: a drawn matrix with no more active entries gets no penalty; nothing else is drawn in its place.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay of active entries.
      reset_moments: moments and step count of the entries begin anew after \(T_p\), as in the released optimizer; its
        variant with masks keeps them.
      seed: of the draws.

    Returns:
      An optax transformation.

    Raises:
      ValueError: an option is out of range, or the rate is None and the threshold infinite; at `update`, `params` is
        missing.
      RankError: `reselect_after`, `min_side` or `min_entries` is no integer, or is negative.
      StructureError: at `init`, the values of a weight have another shape than in `adapted`.

    Note:
      The released default optimizer writes magnitudes in place of values at both selections, differentiates the
      penalty where it has no effect, and skips an update at the second selection. None of that is done here.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> sara = sj.methods.sara
      >>> adapted = sj.adapt({"w": jnp.eye(3)}, {"w": sara.sara(0.5)}, key=jax.random.key(0))
      >>> optimizer = sara.sara_adam(1e-2, adapted, threshold=0.5, reselect_after=100, min_side=0)
      >>> state = optimizer.init(sj.partition(adapted)[0])
      >>> state[0].active["w"].shape
      (6,)
    """
    rate = default_rate(threshold) if learning_rate is None else learning_rate
    direction = scale_by_sara(
        adapted,
        threshold=threshold,
        reselect_after=reselect_after,
        penalty=penalty,
        mode=mode,
        min_side=min_side,
        min_entries=min_entries,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        reset_moments=reset_moments,
        seed=seed,
    )
    return optax.chain(direction, optax.scale_by_learning_rate(rate))
