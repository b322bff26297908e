"""LoRA-Pro: changes both factors so that the weight moves as closely as possible along its full gradient."""

from subspace_jax.core import register
from subspace_jax.methods.optimizers.lora_pro._adjust import Adjusted as Adjusted
from subspace_jax.methods.optimizers.lora_pro._adjust import adjust_pair as adjust_pair
from subspace_jax.methods.optimizers.lora_pro._adjust import equivalent_gradient as equivalent_gradient
from subspace_jax.methods.optimizers.lora_pro._adjust import plain_pair as plain_pair
from subspace_jax.methods.optimizers.lora_pro._pair import Pair as Pair
from subspace_jax.methods.optimizers.lora_pro._pair import low_rank_pairs as low_rank_pairs
from subspace_jax.methods.optimizers.lora_pro._transform import LoraProAdamState as LoraProAdamState
from subspace_jax.methods.optimizers.lora_pro._transform import lora_pro as lora_pro
from subspace_jax.methods.optimizers.lora_pro._transform import lora_pro_adam as lora_pro_adam
from subspace_jax.methods.optimizers.lora_pro._transform import scale_by_lora_pro as scale_by_lora_pro
from subspace_jax.methods.optimizers.lora_pro._transform import scale_by_lora_pro_adam as scale_by_lora_pro_adam

__all__ = [
    "Adjusted",
    "LoraProAdamState",
    "Pair",
    "adjust_pair",
    "equivalent_gradient",
    "lora_pro",
    "lora_pro_adam",
    "low_rank_pairs",
    "plain_pair",
    "scale_by_lora_pro",
    "scale_by_lora_pro_adam",
]

register(
    __name__,
    title="LoRA-Pro: Are Low-Rank Adapters Properly Optimized?",
    authors="Wang, Liang, He, Wang, Tan",
    year=2025,
    kinds=("transformation",),
    use_for="LoRA whose result depends less on the rate, when there is no time to tune it.",
    not_for="Rates are tuned, where LoRA is level; with Adam it keeps moments of the weight's own size.",
    differs="Inverses are damped by `delta`.",
)
