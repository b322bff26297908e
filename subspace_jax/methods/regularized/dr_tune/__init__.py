"""DR-Tune: the new head must also classify the frozen encoder's features, brought to where they have moved."""

from subspace_jax.core import register
from subspace_jax.methods.regularized.dr_tune._bank import FeatureBank as FeatureBank
from subspace_jax.methods.regularized.dr_tune._bank import enqueue as enqueue
from subspace_jax.methods.regularized.dr_tune._bank import fill as fill
from subspace_jax.methods.regularized.dr_tune._bank import init_bank as init_bank
from subspace_jax.methods.regularized.dr_tune._bank import new_epoch as new_epoch
from subspace_jax.methods.regularized.dr_tune._calibrate import calibrate as calibrate
from subspace_jax.methods.regularized.dr_tune._calibrate import rotate as rotate
from subspace_jax.methods.regularized.dr_tune._calibrate import rotation as rotation
from subspace_jax.methods.regularized.dr_tune._calibrate import translate as translate
from subspace_jax.methods.regularized.dr_tune._loss import loss as loss

__all__ = [
    "FeatureBank",
    "calibrate",
    "enqueue",
    "fill",
    "init_bank",
    "loss",
    "new_epoch",
    "rotate",
    "rotation",
    "translate",
]

register(
    __name__,
    title="DR-Tune: Improving Fine-tuning of Pretrained Visual Models by Distribution Regularization with Semantic "
    "Calibration",
    authors="Zhou, Chen, Huang",
    year=2023,
    kinds=("penalty",),
    use_for="Tuning an encoder with a new head on few labels, when rates cannot be tuned.",
    not_for="Rates are tuned: then cross-entropy alone is level.",
    differs="Equal weights for the class means (`confidence=False`) are an option that is not published.",
)
