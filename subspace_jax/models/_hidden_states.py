"""What the blocks of a vision transformer hand to each other: its hidden states, and features of patches from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._layers import LAYER_PREFIX, STACK_NAME, unstack_layers
from ._vit import Vit, VitBlock, VitEmbeddings


def hidden_states(model: Vit, params: Any, images: jax.Array, layers: Sequence[int]) -> jax.Array:
    """Returns raw hidden states of a vision transformer, before its final norm.

    Index 0 is the embedding, index i the output of the i-th block. Blocks above the last one asked for are not run.

    Args:
        model: the module.
        params: its parameters, unrolled or stacked.
        images: `[batch, height, width, 3]`, see `normalize_images`.
        layers: indices between 0 and the number of blocks.

    Returns:
        `[len(layers), batch, 1 + patches, width]`, class token first; `config.dtype`.

    Raises:
        ValueError: no layers, or one that the model does not have.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from subspace_jax.models import Vit, hidden_states, small_vit
        >>> model, images = Vit(small_vit()), jnp.zeros((2, 8, 8, 3))
        >>> params = model.init(jax.random.key(0), images)["params"]
        >>> hidden_states(model, params, images, (1, 2)).shape
        (2, 2, 5, 32)
    """
    config = dataclasses.replace(model.config, scan_layers=False)
    wanted = [int(layer) for layer in layers]
    if not wanted or not all(0 <= layer <= config.num_layers for layer in wanted):
        raise ValueError(f"hidden_states: layers={tuple(layers)}; expected some of 0 to {config.num_layers}.")
    encoder = params["encoder"]
    blocks = unstack_layers(encoder) if STACK_NAME in encoder else encoder
    x: Any = VitEmbeddings(config).apply({"params": params["embeddings"]}, images.astype(config.dtype))
    found = [x]
    for layer in range(max(wanted)):
        x = VitBlock(config).apply({"params": blocks[f"{LAYER_PREFIX}{layer}"]}, x)[0]
        found.append(x)
    return jnp.stack([found[layer] for layer in wanted])


def patch_features(model: Vit, params: Any, images: jax.Array, layers: Sequence[int]) -> jax.Array:
    """Returns the mean over some layers of every patch's hidden state, as a grid; the class token is dropped.

    Args:
        model: the module.
        params: its parameters.
        images: `[batch, height, width, 3]`, see `normalize_images`.
        layers: as of `hidden_states`.

    Returns:
        `[batch, rows, columns, width]`, at least float32.

    Raises:
        ValueError: as of `hidden_states`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from subspace_jax.models import Vit, patch_features, small_vit
        >>> model, images = Vit(small_vit()), jnp.zeros((2, 8, 12, 3))
        >>> params = model.init(jax.random.key(0), images)["params"]
        >>> patch_features(model, params, images, (1, 2)).shape
        (2, 2, 3, 32)
    """
    states = hidden_states(model, params, images, layers)[:, :, 1:]
    mean = jnp.mean(states.astype(jnp.promote_types(states.dtype, jnp.float32)), axis=0)
    patch = model.config.patch_size
    return mean.reshape(len(images), images.shape[1] // patch, images.shape[2] // patch, mean.shape[-1])
