"""OFT: rotates a weight by orthogonal blocks, and COFT, which keeps them near the identity."""

from subspace_jax.core import register
from subspace_jax.methods.structured.oft._method import coft_projection as coft_projection
from subspace_jax.methods.structured.oft._method import oft as oft
from subspace_jax.methods.structured.oft._weight import Rotated as Rotated

__all__ = [
    "Rotated",
    "coft_projection",
    "oft",
]

register(
    __name__,
    title="Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
    authors="Qiu, Liu, Feng, Xue, Feng, Liu, Zhang, Weller, Schölkopf",
    year=2023,
    kinds=("weight", "transformation"),
    use_for="Changes that turn features and keep the singular values, and merges that keep them as well.",
    not_for="Lengths have to change: a rotation cannot, unless `magnitude=True`.",
    differs="The exact Cayley transform is the default; `terms=5` is the usual series.",
)
