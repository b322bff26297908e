"""Methods that add a term to the loss."""

from subspace_jax.methods.regularized import lambda_orthogonality as lambda_orthogonality

__all__ = [
    "lambda_orthogonality",
]
