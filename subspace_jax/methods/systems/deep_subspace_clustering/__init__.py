"""Deep subspace clustering without labels and tuning: one self-expression matrix for all layers of an autoencoder."""

from subspace_jax.core import register
from subspace_jax.methods.systems.deep_subspace_clustering._cluster import Clustering as Clustering
from subspace_jax.methods.systems.deep_subspace_clustering._cluster import cluster as cluster
from subspace_jax.methods.systems.deep_subspace_clustering._cluster import same_partition as same_partition
from subspace_jax.methods.systems.deep_subspace_clustering._expression import closed_form as closed_form
from subspace_jax.methods.systems.deep_subspace_clustering._expression import expression_loss as expression_loss
from subspace_jax.methods.systems.deep_subspace_clustering._expression import normalize_rows as normalize_rows
from subspace_jax.methods.systems.deep_subspace_clustering._expression import structured_norm as structured_norm
from subspace_jax.methods.systems.deep_subspace_clustering._networks import Network as Network
from subspace_jax.methods.systems.deep_subspace_clustering._networks import conv_network as conv_network
from subspace_jax.methods.systems.deep_subspace_clustering._networks import dense_network as dense_network
from subspace_jax.methods.systems.deep_subspace_clustering._networks import expressed_layers as expressed_layers
from subspace_jax.methods.systems.deep_subspace_clustering._outside import cluster_subspaces as cluster_subspaces
from subspace_jax.methods.systems.deep_subspace_clustering._outside import nearest_subspace as nearest_subspace
from subspace_jax.methods.systems.deep_subspace_clustering._spectral import affinity as affinity
from subspace_jax.methods.systems.deep_subspace_clustering._spectral import k_means as k_means
from subspace_jax.methods.systems.deep_subspace_clustering._spectral import spectral_clusters as spectral_clusters
from subspace_jax.methods.systems.deep_subspace_clustering._stages import pretrain as pretrain
from subspace_jax.methods.systems.deep_subspace_clustering._stages import self_express as self_express
from subspace_jax.methods.systems.deep_subspace_clustering._stages import tune as tune
from subspace_jax.methods.systems.deep_subspace_clustering._stopping import Minimized as Minimized
from subspace_jax.methods.systems.deep_subspace_clustering._stopping import StoppingRule as StoppingRule
from subspace_jax.methods.systems.deep_subspace_clustering._stopping import minimize as minimize

__all__ = [
    "Clustering",
    "Minimized",
    "Network",
    "StoppingRule",
    "affinity",
    "closed_form",
    "cluster",
    "cluster_subspaces",
    "conv_network",
    "dense_network",
    "expressed_layers",
    "expression_loss",
    "k_means",
    "minimize",
    "nearest_subspace",
    "normalize_rows",
    "pretrain",
    "same_partition",
    "self_express",
    "spectral_clusters",
    "structured_norm",
    "tune",
]

register(
    __name__,
    title="Label-independent hyperparameter-free self-supervised single-view deep subspace clustering",
    authors="Sindicic, Kopriva",
    year=2025,
    kinds=("system",),
    use_for="Grouping images or features that lie near subspaces, without labels.",
    not_for="Groups are round clouds: k-means is simpler.",
    differs="Training stops by a window of ten iterations, where the usual rule looks at a single change.",
)
