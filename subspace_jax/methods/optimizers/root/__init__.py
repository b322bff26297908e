"""ROOT: cuts outliers off the momentum and orthogonalizes the rest by coefficients that fit the matrix's size."""

from subspace_jax.core import register
from subspace_jax.methods.optimizers.root._coefficients import MUON as MUON
from subspace_jax.methods.optimizers.root._coefficients import PUBLISHED as PUBLISHED
from subspace_jax.methods.optimizers.root._coefficients import calibrate as calibrate
from subspace_jax.methods.optimizers.root._coefficients import coefficients_for as coefficients_for
from subspace_jax.methods.optimizers.root._coefficients import is_safe as is_safe
from subspace_jax.methods.optimizers.root._coefficients import newton_schulz_map as newton_schulz_map
from subspace_jax.methods.optimizers.root._coefficients import random_spectra as random_spectra
from subspace_jax.methods.optimizers.root._transform import clip_by_quantile as clip_by_quantile
from subspace_jax.methods.optimizers.root._transform import clip_entries as clip_entries
from subspace_jax.methods.optimizers.root._transform import orthogonalize as orthogonalize
from subspace_jax.methods.optimizers.root._transform import root as root
from subspace_jax.methods.optimizers.root._transform import scale_by_root as scale_by_root

__all__ = [
    "MUON",
    "PUBLISHED",
    "calibrate",
    "clip_by_quantile",
    "clip_entries",
    "coefficients_for",
    "is_safe",
    "newton_schulz_map",
    "orthogonalize",
    "random_spectra",
    "root",
    "scale_by_root",
]

register(
    __name__,
    title="ROOT: Robust Orthogonalized Optimizer for Neural Network Training",
    authors="He, Han, Zhou, Chen, Liu, Chen, Wang",
    year=2025,
    kinds=("transformation",),
    use_for="Matrices trained by Muon where single entries of the gradient are spoiled.",
    not_for="Gradients are clean: Muon is level with it.",
    differs=(
        "Coefficients can be calibrated to a matrix's size beside the published table; `safe` replaces published "
        "triples that let singular values end above 1.5."
    ),
)
