"""ARO: descends in coordinates that are rotated at every step to where its rule descends fastest."""

from subspace_jax.core import register
from subspace_jax.methods.optimizers.aro._bases import normalized_rows as normalized_rows
from subspace_jax.methods.optimizers.aro._bases import sinkhorn as sinkhorn
from subspace_jax.methods.optimizers.aro._rotation import orthogonal_factor as orthogonal_factor
from subspace_jax.methods.optimizers.aro._transform import aro as aro
from subspace_jax.methods.optimizers.aro._transform import scale_by_aro as scale_by_aro

__all__ = [
    "aro",
    "normalized_rows",
    "orthogonal_factor",
    "scale_by_aro",
    "sinkhorn",
]

register(
    __name__,
    title="ARO: A New Lens On Matrix Optimization For Large Models",
    authors="Gong, Zazo, Luo, Wang, Hensman, Ma",
    year=2026,
    kinds=("transformation",),
    use_for="Steepest descent with other rules than Muon's, in rotated coordinates.",
    not_for="Memory of the optimizer is short: the rotations add a half to four fifths to Muon's state.",
    differs="Which side is rotated can be said by path; the paper goes by the side of the residual stream.",
)
