"""The mechanism: stand-in weights, and the functions that place, run, split and merge them."""

from subspace_jax.core._adapt import InitFn as InitFn
from subspace_jax.core._adapt import Leaf as Leaf
from subspace_jax.core._adapt import Method as Method
from subspace_jax.core._adapt import PlanFn as PlanFn
from subspace_jax.core._adapt import adapt as adapt
from subspace_jax.core._adapt import full as full
from subspace_jax.core._adapt import require_matrix as require_matrix
from subspace_jax.core._apply import with_adapters as with_adapters
from subspace_jax.core._capture import Statistics as Statistics
from subspace_jax.core._capture import capture as capture
from subspace_jax.core._catalogue import Kind as Kind
from subspace_jax.core._catalogue import Source as Source
from subspace_jax.core._catalogue import catalogue as catalogue
from subspace_jax.core._catalogue import lazy_names as lazy_names
from subspace_jax.core._catalogue import register as register
from subspace_jax.core._checks import check_choice as check_choice
from subspace_jax.core._checks import check_dtype as check_dtype
from subspace_jax.core._checks import check_int as check_int
from subspace_jax.core._checks import check_number as check_number
from subspace_jax.core._checks import check_probability as check_probability
from subspace_jax.core._checks import check_rank as check_rank
from subspace_jax.core._compat import is_tracer as is_tracer
from subspace_jax.core._errors import MaterializeError as MaterializeError
from subspace_jax.core._errors import NonFiniteError as NonFiniteError
from subspace_jax.core._errors import NotMergeableError as NotMergeableError
from subspace_jax.core._errors import PatternError as PatternError
from subspace_jax.core._errors import RankError as RankError
from subspace_jax.core._errors import RoleError as RoleError
from subspace_jax.core._errors import StatisticsError as StatisticsError
from subspace_jax.core._errors import StructureError as StructureError
from subspace_jax.core._errors import SubspaceError as SubspaceError
from subspace_jax.core._errors import WeightFileError as WeightFileError
from subspace_jax.core._errors import nearest as nearest
from subspace_jax.core._full import Full as Full
from subspace_jax.core._interpret import MaterializeRules as MaterializeRules
from subspace_jax.core._interpret import OnMaterialize as OnMaterialize
from subspace_jax.core._labels import placed_like as placed_like
from subspace_jax.core._labels import product as product
from subspace_jax.core._links import resolve_links as resolve_links
from subspace_jax.core._merge import Rounding as Rounding
from subspace_jax.core._merge import merge as merge
from subspace_jax.core._merge import merge_rounding as merge_rounding
from subspace_jax.core._need import InputStatistic as InputStatistic
from subspace_jax.core._need import Need as Need
from subspace_jax.core._need import register_statistic as register_statistic
from subspace_jax.core._operation import Operation as Operation
from subspace_jax.core._operation import dense as dense
from subspace_jax.core._operations import Convolution as Convolution
from subspace_jax.core._operations import Dot as Dot
from subspace_jax.core._operations import Lookup as Lookup
from subspace_jax.core._partition import combine as combine
from subspace_jax.core._partition import key_for as key_for
from subspace_jax.core._partition import partition as partition
from subspace_jax.core._partition import with_dropout as with_dropout
from subspace_jax.core._paths import leaves_with_paths as leaves_with_paths
from subspace_jax.core._paths import map_with_paths as map_with_paths
from subspace_jax.core._paths import matches as matches
from subspace_jax.core._paths import path_string as path_string
from subspace_jax.core._put import put as put
from subspace_jax.core._register_weight import register_weight as register_weight
from subspace_jax.core._register_weight import structure_names as structure_names
from subspace_jax.core._register_weight import structure_of as structure_of
from subspace_jax.core._role import Role as Role
from subspace_jax.core._roles import roles as roles
from subspace_jax.core._selectors import select_paths as select_paths
from subspace_jax.core._summary import Summary as Summary
from subspace_jax.core._summary import SummaryRow as SummaryRow
from subspace_jax.core._summary import summary as summary
from subspace_jax.core._summary import trainable_size as trainable_size
from subspace_jax.core._types import Batch as Batch
from subspace_jax.core._types import OptState as OptState
from subspace_jax.core._types import Params as Params
from subspace_jax.core._types import PyTree as PyTree
from subspace_jax.core._types import Scalar as Scalar
from subspace_jax.core._types import ScalarOrSchedule as ScalarOrSchedule
from subspace_jax.core._types import Schedule as Schedule
from subspace_jax.core._types import Updates as Updates
from subspace_jax.core._weight import Weight as Weight
from subspace_jax.core._weight import is_weight as is_weight
from subspace_jax.core._weight import nested_weights as nested_weights
from subspace_jax.core._weight import static as static

__all__ = [
    "Batch",
    "Convolution",
    "Dot",
    "Full",
    "InitFn",
    "InputStatistic",
    "Kind",
    "Leaf",
    "Lookup",
    "MaterializeError",
    "MaterializeRules",
    "Method",
    "Need",
    "NonFiniteError",
    "NotMergeableError",
    "OnMaterialize",
    "Operation",
    "OptState",
    "Params",
    "PatternError",
    "PlanFn",
    "PyTree",
    "RankError",
    "Role",
    "RoleError",
    "Rounding",
    "Scalar",
    "ScalarOrSchedule",
    "Schedule",
    "Source",
    "Statistics",
    "StatisticsError",
    "StructureError",
    "SubspaceError",
    "Summary",
    "SummaryRow",
    "Updates",
    "Weight",
    "WeightFileError",
    "adapt",
    "capture",
    "catalogue",
    "check_choice",
    "check_dtype",
    "check_int",
    "check_number",
    "check_probability",
    "check_rank",
    "combine",
    "dense",
    "full",
    "is_tracer",
    "is_weight",
    "key_for",
    "lazy_names",
    "leaves_with_paths",
    "map_with_paths",
    "matches",
    "merge",
    "merge_rounding",
    "nearest",
    "nested_weights",
    "partition",
    "path_string",
    "placed_like",
    "product",
    "put",
    "register",
    "register_statistic",
    "register_weight",
    "require_matrix",
    "resolve_links",
    "roles",
    "select_paths",
    "static",
    "structure_names",
    "structure_of",
    "summary",
    "trainable_size",
    "with_adapters",
    "with_dropout",
]
