"""Methods that add a term to the loss."""

from subspace_jax.methods.regularized import lambda_orthogonality as lambda_orthogonality
from subspace_jax.methods.regularized import orthogonal_conv as orthogonal_conv

__all__ = [
    "lambda_orthogonality",
    "orthogonal_conv",
]
