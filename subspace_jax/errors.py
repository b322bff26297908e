"""Every error of the library; all but `FetchError`, `AssetMissingError` and the archive's are `SubspaceError`s."""

from subspace_jax.assets import AssetMissingError as AssetMissingError
from subspace_jax.assets import FetchError as FetchError
from subspace_jax.assets import UnknownAssetError as UnknownAssetError
from subspace_jax.assets import UnsafeArchiveError as UnsafeArchiveError
from subspace_jax.continual import StreamError as StreamError
from subspace_jax.core import MaterializeError as MaterializeError
from subspace_jax.core import NonFiniteError as NonFiniteError
from subspace_jax.core import NotMergeableError as NotMergeableError
from subspace_jax.core import PatternError as PatternError
from subspace_jax.core import RankError as RankError
from subspace_jax.core import RoleError as RoleError
from subspace_jax.core import StatisticsError as StatisticsError
from subspace_jax.core import StructureError as StructureError
from subspace_jax.core import SubspaceError as SubspaceError
from subspace_jax.core import WeightFileError as WeightFileError
from subspace_jax.io import AdapterFileError as AdapterFileError
from subspace_jax.io import CheckpointError as CheckpointError
from subspace_jax.io import ManifestError as ManifestError

__all__ = [
    "AdapterFileError",
    "AssetMissingError",
    "CheckpointError",
    "FetchError",
    "ManifestError",
    "MaterializeError",
    "NonFiniteError",
    "NotMergeableError",
    "PatternError",
    "RankError",
    "RoleError",
    "StatisticsError",
    "StreamError",
    "StructureError",
    "SubspaceError",
    "UnknownAssetError",
    "UnsafeArchiveError",
    "WeightFileError",
]
