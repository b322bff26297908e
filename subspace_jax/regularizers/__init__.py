"""Terms of a loss: distances of matrices from orthogonality, and of two models' features from each other."""

from subspace_jax.regularizers._compatibility import AlignmentLosses as AlignmentLosses
from subspace_jax.regularizers._compatibility import CompatibilityLosses as CompatibilityLosses
from subspace_jax.regularizers._compatibility import Reduction as Reduction
from subspace_jax.regularizers._compatibility import alignment_losses as alignment_losses
from subspace_jax.regularizers._compatibility import compatibility_loss as compatibility_loss
from subspace_jax.regularizers._compatibility import contrastive_loss as contrastive_loss
from subspace_jax.regularizers._lambda_orthogonality import lambda_orthogonality as lambda_orthogonality
from subspace_jax.regularizers._lambda_orthogonality import (
    lambda_orthogonality_gradient as lambda_orthogonality_gradient,
)
from subspace_jax.regularizers._lambda_orthogonality import soft_orthogonality as soft_orthogonality

__all__ = [
    "AlignmentLosses",
    "CompatibilityLosses",
    "Reduction",
    "alignment_losses",
    "compatibility_loss",
    "contrastive_loss",
    "lambda_orthogonality",
    "lambda_orthogonality_gradient",
    "soft_orthogonality",
]
