"""λ-orthogonality: keeps a map within a chosen distance of orthogonal, for compatible features."""

from typing import TYPE_CHECKING

from subspace_jax.core import lazy_names, register
from subspace_jax.methods.regularized.lambda_orthogonality._backfilling import backfill_order as backfill_order
from subspace_jax.methods.regularized.lambda_orthogonality._backfilling import backfilling_curve as backfilling_curve
from subspace_jax.methods.regularized.lambda_orthogonality._compatibility import AlignmentLosses as AlignmentLosses
from subspace_jax.methods.regularized.lambda_orthogonality._compatibility import (
    CompatibilityLosses as CompatibilityLosses,
)
from subspace_jax.methods.regularized.lambda_orthogonality._compatibility import Reduction as Reduction
from subspace_jax.methods.regularized.lambda_orthogonality._compatibility import alignment_losses as alignment_losses
from subspace_jax.methods.regularized.lambda_orthogonality._compatibility import (
    compatibility_loss as compatibility_loss,
)
from subspace_jax.methods.regularized.lambda_orthogonality._compatibility import contrastive_loss as contrastive_loss
from subspace_jax.methods.regularized.lambda_orthogonality._maps import BackwardMap as BackwardMap
from subspace_jax.methods.regularized.lambda_orthogonality._maps import ForwardMap as ForwardMap
from subspace_jax.methods.regularized.lambda_orthogonality._maps import orthogonal_kernel as orthogonal_kernel
from subspace_jax.methods.regularized.lambda_orthogonality._penalty import lambda_orthogonality as lambda_orthogonality
from subspace_jax.methods.regularized.lambda_orthogonality._penalty import (
    lambda_orthogonality_gradient as lambda_orthogonality_gradient,
)
from subspace_jax.methods.regularized.lambda_orthogonality._penalty import soft_orthogonality as soft_orthogonality
from subspace_jax.methods.regularized.lambda_orthogonality._scores import average_compatibility as average_compatibility
from subspace_jax.methods.regularized.lambda_orthogonality._scores import (
    average_multimodel_score as average_multimodel_score,
)
from subspace_jax.methods.regularized.lambda_orthogonality._scores import backfilling_score as backfilling_score
from subspace_jax.methods.regularized.lambda_orthogonality._scores import is_compatible as is_compatible
from subspace_jax.methods.regularized.lambda_orthogonality._scores import update_gain as update_gain
from subspace_jax.methods.regularized.lambda_orthogonality._transform import (
    AddLambdaOrthogonalityState as AddLambdaOrthogonalityState,
)
from subspace_jax.methods.regularized.lambda_orthogonality._transform import (
    add_lambda_orthogonality as add_lambda_orthogonality,
)

if TYPE_CHECKING:
    from subspace_jax.methods.regularized.lambda_orthogonality._nnx_maps import NNXBackwardMap as NNXBackwardMap
    from subspace_jax.methods.regularized.lambda_orthogonality._nnx_maps import NNXForwardMap as NNXForwardMap

__all__ = [
    "AddLambdaOrthogonalityState",
    "AlignmentLosses",
    "BackwardMap",
    "CompatibilityLosses",
    "ForwardMap",
    "NNXBackwardMap",
    "NNXForwardMap",
    "Reduction",
    "add_lambda_orthogonality",
    "alignment_losses",
    "average_compatibility",
    "average_multimodel_score",
    "backfill_order",
    "backfilling_curve",
    "backfilling_score",
    "compatibility_loss",
    "contrastive_loss",
    "is_compatible",
    "lambda_orthogonality",
    "lambda_orthogonality_gradient",
    "orthogonal_kernel",
    "soft_orthogonality",
    "update_gain",
]

__getattr__ = lazy_names(__name__, {"NNXBackwardMap": "_nnx_maps", "NNXForwardMap": "_nnx_maps"})

register(
    __name__,
    title="λ-Orthogonality Regularization for Compatible Representation Learning",
    authors="Ricci, Biondi, Pernici, Patras, Del Bimbo",
    year=2025,
    kinds=("penalty", "transformation", "module"),
    use_for="Replacing an encoder without recomputing a gallery: a map that adapts and loses little elsewhere.",
    not_for="The free affine map already loses nothing elsewhere.",
    differs=(
        "The distance scales with the size of the kernel by default; weights that the paper leaves open are this "
        "library's."
    ),
)
