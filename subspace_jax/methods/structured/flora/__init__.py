"""FLoRA: trains a Tucker core, so that convolutions keep their axes."""

from subspace_jax.core import register
from subspace_jax.methods.structured.flora._method import flora as flora
from subspace_jax.methods.structured.flora._method import to_lora as to_lora
from subspace_jax.methods.structured.flora._weight import Tucker as Tucker
from subspace_jax.methods.structured.flora._weight import tucker_in_factors as tucker_in_factors

__all__ = [
    "Tucker",
    "flora",
    "to_lora",
    "tucker_in_factors",
]

register(
    __name__,
    title="FLoRA: Low-Rank Core Space for N-dimension",
    authors="Si, Wang, Yang, Xu, Li, Dai, Qiao, Yang, Shen",
    year=2024,
    kinds=("weight",),
    use_for="Convolutions, whose axes stay axes.",
    not_for="Dense kernels: there it is LoRA with a core between the factors.",
)
