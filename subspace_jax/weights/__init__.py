"""Stand-in weights that several methods share, and helpers to write others."""

from subspace_jax.weights._adapter_bank import AdapterBank as AdapterBank
from subspace_jax.weights._as_low_rank import AsLowRank as AsLowRank
from subspace_jax.weights._chosen_entries import entries_on_host as entries_on_host
from subspace_jax.weights._chosen_entries import largest_of_all as largest_of_all
from subspace_jax.weights._chosen_entries import positions_of as positions_of
from subspace_jax.weights._convolution import feature_place as feature_place
from subspace_jax.weights._draw_basis import draw_basis as draw_basis
from subspace_jax.weights._dropout import drop_examples as drop_examples
from subspace_jax.weights._dropout import drop_inputs as drop_inputs
from subspace_jax.weights._dropout import step_keys as step_keys
from subspace_jax.weights._entries import entries_at as entries_at
from subspace_jax.weights._entries import flat_entries as flat_entries
from subspace_jax.weights._entries import in_blocks as in_blocks
from subspace_jax.weights._entries import migrate_entries as migrate_entries
from subspace_jax.weights._entries import placed_as as placed_as
from subspace_jax.weights._entries import unflat_entries as unflat_entries
from subspace_jax.weights._gguf_blocks import BLOCK_KINDS as BLOCK_KINDS
from subspace_jax.weights._largest_entries import largest_entries as largest_entries
from subspace_jax.weights._lengths import column_lengths as column_lengths
from subspace_jax.weights._low_rank import LowRank as LowRank
from subspace_jax.weights._low_rank_core import LowRankCore as LowRankCore
from subspace_jax.weights._low_rank_core import Route as Route
from subspace_jax.weights._map import map_weights as map_weights
from subspace_jax.weights._nf4 import NF4 as NF4
from subspace_jax.weights._nf4 import quantize_nf4 as quantize_nf4
from subspace_jax.weights._originals import original_arrays as original_arrays
from subspace_jax.weights._pack import pack_blocks as pack_blocks
from subspace_jax.weights._pack import stack_packed as stack_packed
from subspace_jax.weights._packed import Packed as Packed
from subspace_jax.weights._scale import lora_scale as lora_scale
from subspace_jax.weights._sparse import SparseBlocks as SparseBlocks
from subspace_jax.weights._sparse import SparseDelta as SparseDelta
from subspace_jax.weights._sparse import SparseMode as SparseMode
from subspace_jax.weights._stored import Stored as Stored
from subspace_jax.weights._zeros import hidden_zeros as hidden_zeros

__all__ = [
    "BLOCK_KINDS",
    "NF4",
    "AdapterBank",
    "AsLowRank",
    "LowRank",
    "LowRankCore",
    "Packed",
    "Route",
    "SparseBlocks",
    "SparseDelta",
    "SparseMode",
    "Stored",
    "column_lengths",
    "draw_basis",
    "drop_examples",
    "drop_inputs",
    "entries_at",
    "entries_on_host",
    "feature_place",
    "flat_entries",
    "hidden_zeros",
    "in_blocks",
    "largest_entries",
    "largest_of_all",
    "lora_scale",
    "map_weights",
    "migrate_entries",
    "original_arrays",
    "pack_blocks",
    "placed_as",
    "positions_of",
    "quantize_nf4",
    "stack_packed",
    "step_keys",
    "unflat_entries",
]
