"""Numerical linear algebra that adapters, optimizers and merging share."""

from subspace_jax.linalg._column_selection import FixedBasis as FixedBasis
from subspace_jax.linalg._column_selection import Selected as Selected
from subspace_jax.linalg._column_selection import Transform as Transform
from subspace_jax.linalg._column_selection import chosen_columns as chosen_columns
from subspace_jax.linalg._column_selection import fixed_basis as fixed_basis
from subspace_jax.linalg._column_selection import select_columns as select_columns
from subspace_jax.linalg._column_selection import transform_rows as transform_rows
from subspace_jax.linalg._cosine_matrix import cosine_matrix as cosine_matrix
from subspace_jax.linalg._cosine_matrix import cosine_vectors as cosine_vectors
from subspace_jax.linalg._cosine_transform import Residuals as Residuals
from subspace_jax.linalg._cosine_transform import best_cosine_terms as best_cosine_terms
from subspace_jax.linalg._cosine_transform import compare_residuals as compare_residuals
from subspace_jax.linalg._cosine_transform import cosine_transform as cosine_transform
from subspace_jax.linalg._cosine_transform import inverse_cosine_transform as inverse_cosine_transform
from subspace_jax.linalg._folded_cosine import cosine_rows as cosine_rows
from subspace_jax.linalg._folded_cosine import transform_share as transform_share
from subspace_jax.linalg._frequent_directions import frequent_directions as frequent_directions
from subspace_jax.linalg._kronecker import KroneckerSplit as KroneckerSplit
from subspace_jax.linalg._kronecker import KroneckerSVD as KroneckerSVD
from subspace_jax.linalg._kronecker import balanced_split as balanced_split
from subspace_jax.linalg._kronecker import kronecker_rows as kronecker_rows
from subspace_jax.linalg._kronecker import kronecker_sum as kronecker_sum
from subspace_jax.linalg._kronecker import kronecker_svd as kronecker_svd
from subspace_jax.linalg._kronecker import rearrange as rearrange
from subspace_jax.linalg._kronecker import unrearrange as unrearrange
from subspace_jax.linalg._magnitudes import kth_smallest_magnitude as kth_smallest_magnitude
from subspace_jax.linalg._magnitudes import magnitude_quantile as magnitude_quantile
from subspace_jax.linalg._newton_schulz import NEWTON_SCHULZ_COEFFICIENTS as NEWTON_SCHULZ_COEFFICIENTS
from subspace_jax.linalg._newton_schulz import newton_schulz as newton_schulz
from subspace_jax.linalg._orthogonal import cayley as cayley
from subspace_jax.linalg._orthogonal import cayley_neumann as cayley_neumann
from subspace_jax.linalg._orthogonal import skew as skew
from subspace_jax.linalg._orthogonal import skew_size as skew_size
from subspace_jax.linalg._polar import PolarMethod as PolarMethod
from subspace_jax.linalg._polar import polar as polar
from subspace_jax.linalg._remover import Remover as Remover
from subspace_jax.linalg._remover import bucketed as bucketed
from subspace_jax.linalg._remover import make_remover as make_remover
from subspace_jax.linalg._sharding import by_compiler as by_compiler
from subspace_jax.linalg._sharding import stack_is_whole as stack_is_whole
from subspace_jax.linalg._sharding import whole_matrices as whole_matrices
from subspace_jax.linalg._spectrum import Combine as Combine
from subspace_jax.linalg._spectrum import allocate_terms as allocate_terms
from subspace_jax.linalg._spectrum import count_terms as count_terms
from subspace_jax.linalg._spectrum import elbow_terms as elbow_terms
from subspace_jax.linalg._spectrum import energy_terms as energy_terms
from subspace_jax.linalg._subspace import Mode as Mode
from subspace_jax.linalg._subspace import Side as Side
from subspace_jax.linalg._subspace import complete as complete
from subspace_jax.linalg._subspace import from_coordinates as from_coordinates
from subspace_jax.linalg._subspace import orthonormalize as orthonormalize
from subspace_jax.linalg._subspace import project as project
from subspace_jax.linalg._subspace import to_coordinates as to_coordinates
from subspace_jax.linalg._subspace import transport as transport
from subspace_jax.linalg._subspace import wide_matmul as wide_matmul
from subspace_jax.linalg._svd import SVD as SVD
from subspace_jax.linalg._svd import fix_signs as fix_signs
from subspace_jax.linalg._svd import is_narrow as is_narrow
from subspace_jax.linalg._svd import product_svd as product_svd
from subspace_jax.linalg._svd import randomized_svd as randomized_svd
from subspace_jax.linalg._svd import truncated_svd as truncated_svd
from subspace_jax.linalg._svd import wide_dtype as wide_dtype

__all__ = [
    "NEWTON_SCHULZ_COEFFICIENTS",
    "SVD",
    "Combine",
    "FixedBasis",
    "KroneckerSVD",
    "KroneckerSplit",
    "Mode",
    "PolarMethod",
    "Remover",
    "Residuals",
    "Selected",
    "Side",
    "Transform",
    "allocate_terms",
    "balanced_split",
    "best_cosine_terms",
    "bucketed",
    "by_compiler",
    "cayley",
    "cayley_neumann",
    "chosen_columns",
    "compare_residuals",
    "complete",
    "cosine_matrix",
    "cosine_rows",
    "cosine_transform",
    "cosine_vectors",
    "count_terms",
    "elbow_terms",
    "energy_terms",
    "fix_signs",
    "fixed_basis",
    "frequent_directions",
    "from_coordinates",
    "inverse_cosine_transform",
    "is_narrow",
    "kronecker_rows",
    "kronecker_sum",
    "kronecker_svd",
    "kth_smallest_magnitude",
    "magnitude_quantile",
    "make_remover",
    "newton_schulz",
    "orthonormalize",
    "polar",
    "product_svd",
    "project",
    "randomized_svd",
    "rearrange",
    "select_columns",
    "skew",
    "skew_size",
    "stack_is_whole",
    "to_coordinates",
    "transform_rows",
    "transform_share",
    "transport",
    "truncated_svd",
    "unrearrange",
    "whole_matrices",
    "wide_dtype",
    "wide_matmul",
]
