"""Gradient transformations for optax that know stand-in weights."""

from subspace_jax.optimizers._alternating import AlternatingState as AlternatingState
from subspace_jax.optimizers._alternating import alternating as alternating
from subspace_jax.optimizers._kronecker_terms import normalize_terms as normalize_terms
from subspace_jax.optimizers._kronecker_terms import prune_terms as prune_terms
from subspace_jax.optimizers._lift_adam import EpsMode as EpsMode
from subspace_jax.optimizers._lift_adam import ScaleByLiftAdamState as ScaleByLiftAdamState
from subspace_jax.optimizers._lift_adam import lift_adam as lift_adam
from subspace_jax.optimizers._lift_adam import scale_by_lift_adam as scale_by_lift_adam
from subspace_jax.optimizers._reselect import refresh_due as refresh_due
from subspace_jax.optimizers._reselect import reselect_principal as reselect_principal

__all__ = [
    "AlternatingState",
    "EpsMode",
    "ScaleByLiftAdamState",
    "alternating",
    "lift_adam",
    "normalize_terms",
    "prune_terms",
    "refresh_due",
    "reselect_principal",
    "scale_by_lift_adam",
]
