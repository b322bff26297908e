"""The key-value cache of a causal model, and what all its layers share about the sequence."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._llama_config import LlamaConfig
from ._rotary import RopeScaling, rotary_tables


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far.

    Attributes:
        keys: `[layers, batch, capacity, kv_heads, head_dim]`, already rotated.
        values: `[layers, batch, capacity, kv_heads, head_dim]`.
        valid: `[batch, capacity]` bool, true at real tokens.
        length: int32 scalar, slots in use.
    """

    keys: jax.Array
    values: jax.Array
    valid: jax.Array
    length: jax.Array


def init_cache(config: LlamaConfig, batch: int, capacity: int) -> KVCache:
    """Returns an empty cache.

    Args:
        config: of the model.
        batch: number of sequences.
        capacity: most tokens that will be held; writing past it is the caller's error and not noticed.

    Returns:
        The cache, arrays in `config.dtype`.

    Example:
        >>> from subspace_jax.models import init_cache, small_llama
        >>> init_cache(small_llama(), 3, 16).keys.shape
        (2, 3, 16, 2, 8)
    """
    shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
    empty = jnp.zeros(shape, config.dtype)
    return KVCache(empty, empty, jnp.zeros((batch, capacity), bool), jnp.zeros((), jnp.int32))


class LayerView(NamedTuple):
    """What all layers share about the sequence: rotary tables, mask, and where new keys are written.

    A mask of None is causal and nothing else.
    Where layers differ, `near` has tables and mask of those with the window.
    """

    sin: jax.Array
    cos: jax.Array
    mask: jax.Array | None
    offset: jax.Array
    near: tuple[jax.Array, jax.Array, jax.Array] | None = None

    def at(self, windowed: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns sines, cosines and mask of a layer, which has the window where `windowed` is true."""
        if windowed is None or self.near is None or self.mask is None:  # a window always has a mask
            return self.sin, self.cos, self.mask
        far = (self.sin, self.cos, self.mask)
        sin, cos, mask = (jnp.where(windowed, one, other) for one, other in zip(self.near, far, strict=True))
        return sin, cos, mask


def view_sequence(
    config: LlamaConfig, real: jax.Array, cache: KVCache | None, segments: jax.Array | None = None
) -> tuple[LayerView, KVCache | None]:
    """Makes rotary tables and mask for new tokens, and marks their slots of the cache as used.

    Args:
        config: of the model.
        real: `[batch, length]` bool, true at real tokens.
        cache: tokens before these, or None.
        segments: `[batch, length]`, which sequence each token is of, where several share a row.

    Returns:
        The view, and the cache whose keys and values are still those from before.

    Raises:
        ValueError: more tokens than the cache could ever hold.
    """
    length = real.shape[1]
    positions = jnp.cumsum(real, axis=1) - 1
    together = jnp.ones((), bool)
    if segments is not None:
        starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        # The count of real tokens before the segment's first one, carried along it.
        positions -= jax.lax.cummax(jnp.where(starts, positions + 1 - real, 0), axis=1)
        together = (segments[:, :, None] == segments[:, None, :])[:, None]
    if cache is None:
        offset, valid = jnp.zeros((), jnp.int32), real
        back = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    else:
        capacity = cache.valid.shape[1]
        if length > capacity:
            raise ValueError(f"Llama: {length} tokens for a cache of {capacity=}; make a larger cache")
        offset = cache.length
        positions = positions + cache.valid.sum(axis=1, keepdims=True)
        valid = jax.lax.dynamic_update_slice(cache.valid, real, (0, offset))
        back = offset + jnp.arange(length)[:, None] - jnp.arange(capacity)[None, :]
        cache = cache._replace(valid=valid, length=offset + length)
    places = jnp.maximum(positions, 0)
    mask = (back >= 0)[None, None] & valid[:, None, None, :] & together
    # Real tokens of a row stand side by side, so slots apart are tokens apart.
    near_mask = mask if config.window is None else mask & (back < config.window)[None, None]
    base = config.rope_base if config.window_rope_base is None else config.window_rope_base
    near_tables = rotary_tables(places, config.head_dim, base, _near_scaling(config))
    if config.window_everywhere:
        return LayerView(*near_tables, near_mask, offset), cache
    tables = rotary_tables(places, config.head_dim, config.rope_base, config.rope_scaling)
    near = (*near_tables, near_mask) if config.mixes_windows else None
    return LayerView(*tables, mask, offset, near), cache


def _near_scaling(config: LlamaConfig) -> RopeScaling | None:
    """Frequencies of their own are not scaled; those that all layers share are."""
    return config.rope_scaling if config.window_rope_base is None else None
