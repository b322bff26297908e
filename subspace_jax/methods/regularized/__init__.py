"""Methods that add a term to the loss."""

from subspace_jax.methods.regularized import dr_tune as dr_tune
from subspace_jax.methods.regularized import lambda_orthogonality as lambda_orthogonality
from subspace_jax.methods.regularized import orthogonal_conv as orthogonal_conv
from subspace_jax.methods.regularized import orthoreg as orthoreg

__all__ = [
    "dr_tune",
    "lambda_orthogonality",
    "orthogonal_conv",
    "orthoreg",
]
