"""Orthogonal convolutions: which exist, a penalty that finds them, and the exact spectrum of a layer."""

from subspace_jax.core import register
from subspace_jax.methods.regularized.orthogonal_conv._existence import can_be_orthogonal as can_be_orthogonal
from subspace_jax.methods.regularized.orthogonal_conv._existence import orthogonal_kernel as orthogonal_kernel
from subspace_jax.methods.regularized.orthogonal_conv._penalty import orthogonality as orthogonality
from subspace_jax.methods.regularized.orthogonal_conv._penalty import self_convolution as self_convolution
from subspace_jax.methods.regularized.orthogonal_conv._spectrum import conv_singular_values as conv_singular_values
from subspace_jax.methods.regularized.orthogonal_conv._spectrum import singular_value_bounds as singular_value_bounds
from subspace_jax.methods.regularized.orthogonal_conv._transform import add_orthogonality as add_orthogonality

__all__ = [
    "add_orthogonality",
    "can_be_orthogonal",
    "conv_singular_values",
    "orthogonal_kernel",
    "orthogonality",
    "self_convolution",
    "singular_value_bounds",
]

register(
    __name__,
    title="Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks",
    authors="Achour, Malgouyres, Mamalet",
    year=2022,
    kinds=("penalty", "transformation"),
    use_for="Convolutions with a bound on their spectrum, on images of any size, from a penalty on kernels.",
    not_for="Exact orthogonality is needed at every step, or padding is not circular at the borders.",
)
