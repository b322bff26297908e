"""Frank-Wolfe dictionary: learns an orthogonal dictionary from a stream, by steps inside the spectral ball."""

from subspace_jax.core import register
from subspace_jax.methods.optimizers.frank_wolfe_dictionary._dictionary import DictionaryState as DictionaryState
from subspace_jax.methods.optimizers.frank_wolfe_dictionary._dictionary import decode as decode
from subspace_jax.methods.optimizers.frank_wolfe_dictionary._dictionary import dictionary_error as dictionary_error
from subspace_jax.methods.optimizers.frank_wolfe_dictionary._dictionary import encode as encode
from subspace_jax.methods.optimizers.frank_wolfe_dictionary._dictionary import finalize as finalize
from subspace_jax.methods.optimizers.frank_wolfe_dictionary._dictionary import gap as gap
from subspace_jax.methods.optimizers.frank_wolfe_dictionary._dictionary import gradient_of as gradient_of
from subspace_jax.methods.optimizers.frank_wolfe_dictionary._dictionary import inverse_root as inverse_root
from subspace_jax.methods.optimizers.frank_wolfe_dictionary._dictionary import start as start
from subspace_jax.methods.optimizers.frank_wolfe_dictionary._dictionary import step as step
from subspace_jax.methods.optimizers.frank_wolfe_dictionary._transform import (
    frank_wolfe_schedule as frank_wolfe_schedule,
)
from subspace_jax.methods.optimizers.frank_wolfe_dictionary._transform import (
    scale_by_spectral_frank_wolfe as scale_by_spectral_frank_wolfe,
)
from subspace_jax.methods.optimizers.frank_wolfe_dictionary._transform import (
    spectral_frank_wolfe as spectral_frank_wolfe,
)

__all__ = [
    "DictionaryState",
    "decode",
    "dictionary_error",
    "encode",
    "finalize",
    "frank_wolfe_schedule",
    "gap",
    "gradient_of",
    "inverse_root",
    "scale_by_spectral_frank_wolfe",
    "spectral_frank_wolfe",
    "start",
    "step",
]

register(
    __name__,
    title="Online Orthogonal Dictionary Learning Based on Frank-Wolfe Method",
    authors="Xue, Lau",
    year=2021,
    kinds=("transformation",),
    use_for="Learning an orthogonal dictionary, or any matrix in the spectral ball, from a stream of single samples.",
    not_for="All data fit in memory: closed-form alternation is simpler.",
)
