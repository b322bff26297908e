"""The catalogue of published methods, where the files of methods look for it."""

from subspace_jax.core import Source as Source
from subspace_jax.core import catalogue as catalogue
from subspace_jax.core import register as register
