"""Parameterisations: what can stand where a weight array stood."""

from subspace_jax.weights._co_permute import Coupling as Coupling
from subspace_jax.weights._co_permute import co_permute as co_permute
from subspace_jax.weights._co_permute import coupled_order as coupled_order
from subspace_jax.weights._co_permute import inverse_order as inverse_order
from subspace_jax.weights._co_permute import reordered as reordered
from subspace_jax.weights._cosine import CosineSpectrum as CosineSpectrum
from subspace_jax.weights._cosine import Evaluation as Evaluation
from subspace_jax.weights._draw_basis import draw_basis as draw_basis
from subspace_jax.weights._entries import entries_at as entries_at
from subspace_jax.weights._entries import flat_entries as flat_entries
from subspace_jax.weights._entries import in_blocks as in_blocks
from subspace_jax.weights._entries import migrate_entries as migrate_entries
from subspace_jax.weights._entries import unflat_entries as unflat_entries
from subspace_jax.weights._kronecker import KroneckerSum as KroneckerSum
from subspace_jax.weights._largest_entries import largest_entries as largest_entries
from subspace_jax.weights._low_rank import LowRank as LowRank
from subspace_jax.weights._low_rank_core import LowRankCore as LowRankCore
from subspace_jax.weights._low_rank_core import Route as Route
from subspace_jax.weights._magnitude import Magnitude as Magnitude
from subspace_jax.weights._map import map_weights as map_weights
from subspace_jax.weights._nested_low_rank import NestedLowRank as NestedLowRank
from subspace_jax.weights._nested_low_rank import RankScale as RankScale
from subspace_jax.weights._nf4 import NF4 as NF4
from subspace_jax.weights._nf4 import quantize_nf4 as quantize_nf4
from subspace_jax.weights._originals import original_arrays as original_arrays
from subspace_jax.weights._random_bases import Pairing as Pairing
from subspace_jax.weights._random_bases import RandomBases as RandomBases
from subspace_jax.weights._rotated import Rotated as Rotated
from subspace_jax.weights._scaled import Scaled as Scaled
from subspace_jax.weights._scaled import ScaledShifted as ScaledShifted
from subspace_jax.weights._scaled import ShiftedBias as ShiftedBias
from subspace_jax.weights._slice_algebra import fuse_slices as fuse_slices
from subspace_jax.weights._slice_algebra import serve_slices as serve_slices
from subspace_jax.weights._slice_algebra import switch_slices as switch_slices
from subspace_jax.weights._slices import DenseSlice as DenseSlice
from subspace_jax.weights._slices import Parameterization as Parameterization
from subspace_jax.weights._sparse import SparseBlocks as SparseBlocks
from subspace_jax.weights._sparse import SparseDelta as SparseDelta
from subspace_jax.weights._sparse import SparseMode as SparseMode
from subspace_jax.weights._split_svd import SplitSVD as SplitSVD
from subspace_jax.weights._tucker import Tucker as Tucker
from subspace_jax.weights._tucker import tucker_in_factors as tucker_in_factors
from subspace_jax.weights._unit_selection import PerLayer as PerLayer
from subspace_jax.weights._unit_selection import select_units as select_units
from subspace_jax.weights._unit_selection import slots_of as slots_of

__all__ = [
    "NF4",
    "CosineSpectrum",
    "Coupling",
    "DenseSlice",
    "Evaluation",
    "KroneckerSum",
    "LowRank",
    "LowRankCore",
    "Magnitude",
    "NestedLowRank",
    "Pairing",
    "Parameterization",
    "PerLayer",
    "RandomBases",
    "RankScale",
    "Rotated",
    "Route",
    "Scaled",
    "ScaledShifted",
    "ShiftedBias",
    "SparseBlocks",
    "SparseDelta",
    "SparseMode",
    "SplitSVD",
    "Tucker",
    "co_permute",
    "coupled_order",
    "draw_basis",
    "entries_at",
    "flat_entries",
    "fuse_slices",
    "in_blocks",
    "inverse_order",
    "largest_entries",
    "map_weights",
    "migrate_entries",
    "original_arrays",
    "quantize_nf4",
    "reordered",
    "select_units",
    "serve_slices",
    "slots_of",
    "switch_slices",
    "tucker_in_factors",
    "unflat_entries",
]
