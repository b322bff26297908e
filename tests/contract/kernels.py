"""The kinds of kernel that every stand-in weight has to serve, and one model that uses them all.

All kernels are leaves of one parameter tree and one model uses them, so that a check compiles one program per method
and not one per kernel. Few distinct matrix shapes keep the decompositions at the start few as well; sizes are even
where a mesh axis of size 2 may split them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kind of kernel and the operation that a model does with it.

    Attributes:
      shape: shape of the array.
      rank: rank of the adapter, where its method has one.
      input_shape: shape of the model's other operand.
      use: the model's operation on the array and that operand.
      dtype: dtype of the array and the operand.
      vocabulary: the operand holds indices below this number instead of reals.
    """

    shape: tuple[int, ...]
    rank: int
    input_shape: tuple[int, ...]
    use: Callable[[jax.Array, jax.Array], jax.Array]
    dtype: Any = jnp.float32
    vocabulary: int | None = None


def _matmul(w, x):
    return x @ w


def _summed_sharding(ndim):
    """What a model with explicit mesh axes says of a product that sums over a split axis."""
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return PartitionSpec("data", *(None,) * (ndim - 1)) if explicit else None


def _row_parallel(w, x):
    return jnp.matmul(x, w, out_sharding=_summed_sharding(2))


def _heads_in(w, x):
    return jnp.einsum("bthk,hkd->btd", x, w, out_sharding=_summed_sharding(3))


def _tied(w, ids):
    return jnp.tanh(jnp.take(w, ids, axis=0)) @ w.T


def _scanned(w, x):
    return lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0]


def _scanned_heads(w, x):
    def layer(h, kernel):
        return jnp.einsum("bhk,hkd->bd", jnp.tanh(jnp.einsum("bd,dhk->bhk", h, kernel)), jnp.ones((2, 4, 8))), None

    return lax.scan(layer, x, w)[0]


def _conv(**options):
    def use(w, x):
        return lax.conv_general_dilated(x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

    return use


KERNELS = {
    "tall": Kernel((12, 6), 2, (4, 12), _matmul),
    "wide": Kernel((6, 12), 2, (4, 6), _row_parallel),
    "square": Kernel((8, 8), 2, (4, 3, 8), _matmul),
    "rank_1": Kernel((12, 6), 1, (4, 12), _matmul),
    "full_rank": Kernel((12, 6), 6, (4, 12), _matmul),
    "transposed": Kernel((6, 12), 2, (4, 12), lambda w, x: x @ w.T),
    "heads_out": Kernel((8, 2, 4), 2, (4, 3, 8), lambda w, x: jnp.einsum("btd,dhk->bthk", x, w)),
    "heads_in": Kernel((2, 4, 8), 2, (4, 3, 2, 4), _heads_in),
    "conv_strided": Kernel((3, 3, 2, 6), 2, (4, 6, 6, 2), _conv(window_strides=(2, 2), padding="SAME")),
    "conv_dilated": Kernel(
        (3, 2, 2, 6), 2, (4, 7, 7, 2), _conv(window_strides=(1, 2), padding=((1, 0), (0, 2)), rhs_dilation=(2, 1))
    ),
    "conv_grouped": Kernel(
        (3, 3, 2, 6), 2, (4, 5, 5, 4), _conv(window_strides=(1, 1), padding="SAME", feature_group_count=2)
    ),
    "embedding": Kernel((12, 6), 2, (4, 3), lambda w, ids: jnp.take(w, ids, axis=0), vocabulary=12),
    "tied": Kernel((12, 6), 2, (4, 3), _tied, vocabulary=12),
    "stacked": Kernel((3, 8, 8), 2, (4, 8), _scanned),
    "stacked_heads": Kernel((3, 8, 2, 4), 2, (4, 8), _scanned_heads),
    "bfloat16": Kernel((12, 6), 2, (4, 12), _matmul, dtype=jnp.bfloat16),
}


def make_params(seed: int = 0) -> dict[str, jax.Array]:
    """Returns one array per kind of kernel."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=k.shape) / np.sqrt(k.shape[0]), k.dtype) for name, k in KERNELS.items()}


def make_inputs(seed: int = 1) -> dict[str, jax.Array]:
    """Returns the other operand of every kernel."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=k.input_shape), k.dtype)
        if k.vocabulary is None
        else jnp.asarray(rng.integers(0, k.vocabulary, k.input_shape), jnp.int32)
        for name, k in KERNELS.items()
    }


def model(params: dict[str, Any], inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Uses every kernel that `params` has on its own operand."""
    return {name: KERNELS[name].use(w, inputs[name]) for name, w in params.items()}


def loss(outputs: dict[str, jax.Array]) -> jax.Array:
    """A scalar that every entry of every output reaches, each with its own weight."""

    def one(y: jax.Array) -> jax.Array:
        weights = np.random.default_rng(y.size).normal(size=y.shape)
        return jnp.sum(y.astype(jnp.float32) * jnp.asarray(weights, jnp.float32))

    return sum((one(y) for y in outputs.values()), jnp.zeros(()))
