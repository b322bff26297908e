"""DCT-AdamW and Trion: low-rank optimizers whose bases are columns of a cosine transform."""

from subspace_jax.core import register
from subspace_jax.methods.optimizers.dct_lowrank._adam import DctAdamState as DctAdamState
from subspace_jax.methods.optimizers.dct_lowrank._adam import dct_adam as dct_adam
from subspace_jax.methods.optimizers.dct_lowrank._adam import scale_by_dct_adam as scale_by_dct_adam
from subspace_jax.methods.optimizers.dct_lowrank._trion import TrionState as TrionState
from subspace_jax.methods.optimizers.dct_lowrank._trion import scale_by_trion as scale_by_trion
from subspace_jax.methods.optimizers.dct_lowrank._trion import trion as trion

__all__ = [
    "DctAdamState",
    "TrionState",
    "dct_adam",
    "scale_by_dct_adam",
    "scale_by_trion",
    "trion",
]

register(
    __name__,
    title="FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
    authors="Modoranu, Safaryan, Schultheis, Ryabinin, Chumachenko, Alistarh",
    year=2025,
    kinds=("transformation",),
    use_for="Low-rank Adam or Muon without any SVD, with one fixed basis for all layers.",
    not_for="The model is small enough for Adam's full state.",
    differs='`basis="random_qr"` is a control of this library.',
)
