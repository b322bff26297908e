"""SNELL: adds a sparse matrix that a kernel function makes of two small factors."""

from subspace_jax.core import register
from subspace_jax.methods.sparse.snell._kernels import Kernel as Kernel
from subspace_jax.methods.sparse.snell._kernels import Rule as Rule
from subspace_jax.methods.sparse.snell._kernels import compete as compete
from subspace_jax.methods.sparse.snell._kernels import kernel_matrix as kernel_matrix
from subspace_jax.methods.sparse.snell._kernels import pieces_sum as pieces_sum
from subspace_jax.methods.sparse.snell._kernels import threshold_order as threshold_order
from subspace_jax.methods.sparse.snell._method import snell as snell
from subspace_jax.methods.sparse.snell._method import start_factors as start_factors
from subspace_jax.methods.sparse.snell._method import to_entries as to_entries
from subspace_jax.methods.sparse.snell._weight import KernelSparse as KernelSparse

__all__ = [
    "Kernel",
    "KernelSparse",
    "Rule",
    "compete",
    "kernel_matrix",
    "pieces_sum",
    "snell",
    "start_factors",
    "threshold_order",
    "to_entries",
]

register(
    __name__,
    title="Expanding Sparse Tuning for Low Memory Usage",
    authors="Shen, Sun, Ji, Huang, Wang",
    year=2024,
    kinds=("weight",),
    use_for="Sparse or full-rank changes with the parameters of two narrow factors.",
    not_for="A step's memory counts: the kernel matrix is formed for each layer.",
    differs='`rule="soft"` is the paper\'s, "hard" the released code\'s.',
)
