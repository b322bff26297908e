"""Parameterisations: what can stand where a weight array stood."""

from subspace_jax.weights._low_rank import LowRank as LowRank
from subspace_jax.weights._low_rank_core import LowRankCore as LowRankCore
from subspace_jax.weights._low_rank_core import Route as Route
from subspace_jax.weights._magnitude import Magnitude as Magnitude
from subspace_jax.weights._nested_low_rank import NestedLowRank as NestedLowRank
from subspace_jax.weights._nested_low_rank import RankScale as RankScale
from subspace_jax.weights._nf4 import NF4 as NF4
from subspace_jax.weights._nf4 import quantize_nf4 as quantize_nf4
from subspace_jax.weights._rotated import Rotated as Rotated

__all__ = [
    "NF4",
    "LowRank",
    "LowRankCore",
    "Magnitude",
    "NestedLowRank",
    "RankScale",
    "Rotated",
    "Route",
    "quantize_nf4",
]
