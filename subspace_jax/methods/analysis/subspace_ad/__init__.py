"""SubspaceAD: finds anomalies in images by what a PCA of a few normal images' patch features does not explain."""

from subspace_jax.core import register
from subspace_jax.methods.analysis.subspace_ad._features import middle_layers as middle_layers
from subspace_jax.methods.analysis.subspace_ad._features import mix_layers as mix_layers
from subspace_jax.methods.analysis.subspace_ad._features import rotate as rotate
from subspace_jax.methods.analysis.subspace_ad._features import rotation_angles as rotation_angles
from subspace_jax.methods.analysis.subspace_ad._fit import PatchSubspace as PatchSubspace
from subspace_jax.methods.analysis.subspace_ad._fit import fit_subspace as fit_subspace
from subspace_jax.methods.analysis.subspace_ad._fit import needed_rank as needed_rank
from subspace_jax.methods.analysis.subspace_ad._kernel import KernelSubspace as KernelSubspace
from subspace_jax.methods.analysis.subspace_ad._kernel import fit_kernel_subspace as fit_kernel_subspace
from subspace_jax.methods.analysis.subspace_ad._kernel import score_kernel as score_kernel
from subspace_jax.methods.analysis.subspace_ad._maps import anomaly_maps as anomaly_maps
from subspace_jax.methods.analysis.subspace_ad._maps import image_scores as image_scores
from subspace_jax.methods.analysis.subspace_ad._moments import Moments as Moments
from subspace_jax.methods.analysis.subspace_ad._moments import add_patches as add_patches
from subspace_jax.methods.analysis.subspace_ad._moments import merge_moments as merge_moments
from subspace_jax.methods.analysis.subspace_ad._moments import no_moments as no_moments
from subspace_jax.methods.analysis.subspace_ad._scores import mask_background as mask_background
from subspace_jax.methods.analysis.subspace_ad._scores import score_patches as score_patches

__all__ = [
    "KernelSubspace",
    "Moments",
    "PatchSubspace",
    "add_patches",
    "anomaly_maps",
    "fit_kernel_subspace",
    "fit_subspace",
    "image_scores",
    "mask_background",
    "merge_moments",
    "middle_layers",
    "mix_layers",
    "needed_rank",
    "no_moments",
    "rotate",
    "rotation_angles",
    "score_kernel",
    "score_patches",
]

register(
    __name__,
    title="SubspaceAD: Training-Free Few-Shot Anomaly Detection via Subspace Modeling",
    authors="Lendering, Akdag, Bondarev",
    year=2026,
    kinds=("analysis",),
    use_for="Localizing defects from one or a few normal images, without training.",
    not_for="Only whole images have to be judged: there the distance to the mean is level.",
    differs=(
        "Our experiment has ten turned copies in place of 30 and a small backbone; `score`, `mix` and `how` offer "
        "other choices beside the published ones."
    ),
)
