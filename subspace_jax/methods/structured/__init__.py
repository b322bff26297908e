"""Adapters of another structure: orthogonal, Tucker, Kronecker, cosine, diagonal."""

from subspace_jax.methods.structured import flora as flora
from subspace_jax.methods.structured import loca as loca
from subspace_jax.methods.structured import oft as oft
from subspace_jax.methods.structured import randlora as randlora
from subspace_jax.methods.structured import soka as soka
from subspace_jax.methods.structured import ssf as ssf

__all__ = [
    "flora",
    "loca",
    "oft",
    "randlora",
    "soka",
    "ssf",
]
