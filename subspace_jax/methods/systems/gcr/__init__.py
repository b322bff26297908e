"""GCR: represents classes as subspaces and trains them on the Grassmannian."""

from typing import TYPE_CHECKING

from subspace_jax.core import lazy_names, register
from subspace_jax.methods.systems.gcr._head import GrassmannHead as GrassmannHead
from subspace_jax.methods.systems.gcr._head import grassmann_logits as grassmann_logits
from subspace_jax.methods.systems.gcr._transform import grassmann_sgd as grassmann_sgd

if TYPE_CHECKING:
    from subspace_jax.methods.systems.gcr._nnx_head import NNXGrassmannHead as NNXGrassmannHead

__all__ = ["GrassmannHead", "NNXGrassmannHead", "grassmann_logits", "grassmann_sgd"]

__getattr__ = lazy_names(__name__, {"NNXGrassmannHead": "_nnx_head"})

register(
    __name__,
    title="Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class Representation",
    authors="Wang, Li, Zhang",
    year=2023,
    kinds=("system", "transformation"),
    use_for="Features of a class that should spread, for transfer or retrieval, at softmax's accuracy.",
    not_for="Accuracy alone counts: softmax is level.",
    differs='`transport="project"` is the paper\'s form; "none" that of the authors\' code.',
)
