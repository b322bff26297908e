"""RandLoRA: trains diagonals between shared random bases for an update of full rank."""

from subspace_jax.core import register
from subspace_jax.methods.structured.randlora._method import randlora as randlora
from subspace_jax.methods.structured.randlora._weight import Pairing as Pairing
from subspace_jax.methods.structured.randlora._weight import RandomBases as RandomBases

__all__ = [
    "Pairing",
    "RandomBases",
    "randlora",
]

register(
    __name__,
    title="RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models",
    authors="Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel, Abbasnejad",
    year=2025,
    kinds=("weight",),
    use_for="Full-rank updates with few trained values.",
    not_for="The change has low rank, or a step's time counts: 1.4 to 1.9 times LoRA's, for twice its operations.",
    differs=(
        "Bases are sized to what the weights read; the authors' code takes the largest inputs and outputs of any "
        'weights. `pairing="peft"` follows PEFT.'
    ),
)
