"""LoRA-Squeeze: trains at a high rank and keeps the best part of a small one, after training or on the way."""

from subspace_jax.core import register
from subspace_jax.methods.low_rank.lora_squeeze._spectrum import recommend_rank as recommend_rank
from subspace_jax.methods.low_rank.lora_squeeze._spectrum import retained as retained
from subspace_jax.methods.low_rank.lora_squeeze._spectrum import spectrum as spectrum
from subspace_jax.methods.low_rank.lora_squeeze._squeeze import squeeze as squeeze
from subspace_jax.methods.low_rank.lora_squeeze._stages import Stage as Stage
from subspace_jax.methods.low_rank.lora_squeeze._stages import stages as stages
from subspace_jax.methods.low_rank.lora_squeeze._state import squeeze_state as squeeze_state
from subspace_jax.methods.low_rank.lora_squeeze._train import train_in_stages as train_in_stages

__all__ = [
    "Stage",
    "recommend_rank",
    "retained",
    "spectrum",
    "squeeze",
    "squeeze_state",
    "stages",
    "train_in_stages",
]

register(
    __name__,
    title="LoRA-Squeeze: Simple and Effective Post-Tuning and In-Tuning Compression of LoRA Modules",
    authors="Vulic, Grycner, de Laroussilhe, Pfeiffer",
    year=2026,
    kinds=("system", "analysis"),
    use_for="Finding the rank after training, or training at a high rank for a small file.",
    not_for="The wanted change has full rank and the target is tiny: then it does not reach direct training.",
    differs="The decomposition works on the factors and is exact; the paper's randomized one is an option.",
)
