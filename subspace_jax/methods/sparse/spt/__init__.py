"""SPT: spends a budget of trained values by sensitivity, on single entries or on modules where many are sensitive."""

from subspace_jax.core import register
from subspace_jax.methods.sparse.spt._allocate import Allocation as Allocation
from subspace_jax.methods.sparse.spt._allocate import Leaf as Leaf
from subspace_jax.methods.sparse.spt._allocate import allocate as allocate
from subspace_jax.methods.sparse.spt._method import spt as spt
from subspace_jax.methods.sparse.spt._weights import DepthLowRank as DepthLowRank
from subspace_jax.methods.sparse.spt._weights import LayerAdapter as LayerAdapter

__all__ = [
    "Allocation",
    "DepthLowRank",
    "LayerAdapter",
    "Leaf",
    "allocate",
    "spt",
]

register(
    __name__,
    title="Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning",
    authors="He, Cai, Zhang, Tao, Zhuang",
    year=2023,
    kinds=("weight",),
    use_for="Spending one budget of trained values where gradients say that it matters.",
    not_for="Rates are tuned: entries of large gradient bear only small ones, and LoRA is level.",
    differs="The released constant for when a module pays is the default; the paper's text is `alpha=1`.",
)
