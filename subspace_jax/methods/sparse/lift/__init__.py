"""LIFT: trains the entries that are largest after rank reduction, selected anew during training."""

from subspace_jax.core import register
from subspace_jax.methods.sparse.lift._method import lift as lift
from subspace_jax.methods.sparse.lift._reselect import refresh_due as refresh_due
from subspace_jax.methods.sparse.lift._reselect import reselect_principal as reselect_principal
from subspace_jax.methods.sparse.lift._transform import EpsMode as EpsMode
from subspace_jax.methods.sparse.lift._transform import ScaleByLiftAdamState as ScaleByLiftAdamState
from subspace_jax.methods.sparse.lift._transform import lift_adam as lift_adam
from subspace_jax.methods.sparse.lift._transform import scale_by_lift_adam as scale_by_lift_adam

__all__ = [
    "EpsMode",
    "ScaleByLiftAdamState",
    "lift",
    "lift_adam",
    "refresh_due",
    "reselect_principal",
    "scale_by_lift_adam",
]

register(
    __name__,
    title="LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for "
    "Reasoning-Focused Supervised Fine-Tuning",
    authors="Liu, Pang, Balabanov, Yang, Huang, Yin, Yang, Liu",
    year=2025,
    kinds=("weight", "transformation"),
    use_for="Fine-tuning with a sparse set of entries and an optimizer state of that size.",
    not_for="A step's time counts: entries are reselected by an SVD-like step, and gradients are whole.",
    differs=(
        "Selection by blocks is an option of this library. The released optimizer takes the largest entries only "
        "if its mask type says so in a word that the scripts leave out; this follows the paper."
    ),
)
