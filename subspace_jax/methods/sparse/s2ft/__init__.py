"""S²FT: trains chosen rows or columns of coupled weights as small dense slices."""

from subspace_jax.core import register
from subspace_jax.methods.sparse.s2ft._algebra import fuse_slices as fuse_slices
from subspace_jax.methods.sparse.s2ft._algebra import serve_slices as serve_slices
from subspace_jax.methods.sparse.s2ft._algebra import switch_slices as switch_slices
from subspace_jax.methods.sparse.s2ft._co_permute import Coupling as Coupling
from subspace_jax.methods.sparse.s2ft._co_permute import co_permute as co_permute
from subspace_jax.methods.sparse.s2ft._co_permute import coupled_order as coupled_order
from subspace_jax.methods.sparse.s2ft._co_permute import inverse_order as inverse_order
from subspace_jax.methods.sparse.s2ft._co_permute import reordered as reordered
from subspace_jax.methods.sparse.s2ft._method import Side as Side
from subspace_jax.methods.sparse.s2ft._method import activation_scores as activation_scores
from subspace_jax.methods.sparse.s2ft._method import channel_scores as channel_scores
from subspace_jax.methods.sparse.s2ft._method import s2ft as s2ft
from subspace_jax.methods.sparse.s2ft._selection import PerLayer as PerLayer
from subspace_jax.methods.sparse.s2ft._selection import select_units as select_units
from subspace_jax.methods.sparse.s2ft._selection import slots_of as slots_of
from subspace_jax.methods.sparse.s2ft._weight import DenseSlice as DenseSlice
from subspace_jax.methods.sparse.s2ft._weight import Parameterization as Parameterization

__all__ = [
    "Coupling",
    "DenseSlice",
    "Parameterization",
    "PerLayer",
    "Side",
    "activation_scores",
    "channel_scores",
    "co_permute",
    "coupled_order",
    "fuse_slices",
    "inverse_order",
    "reordered",
    "s2ft",
    "select_units",
    "serve_slices",
    "slots_of",
    "switch_slices",
]

register(
    __name__,
    title="S^2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
    authors="Yang, Leng, Guo, Zhao, Nakada, Zhang, Yao, Chen",
    year=2024,
    kinds=("weight",),
    use_for="Memory and time of a step among the least of all adapters, by dense slices of heads and channels.",
    not_for="The best accuracy at any size is wanted: LoRA fits more at its best rate.",
    differs=(
        "Weights stay in place by default, and rows are picked by position; the paper reorders them, for which "
        "`select_units`, `coupled_order` and `co_permute` are there."
    ),
)
