"""Llama: a causal language model (Touvron and others, 2023)."""

from __future__ import annotations

from typing import Any, overload

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._attention import attend
from ._cache import KVCache, LayerView, view_sequence
from ._layers import run_layers
from ._llama_config import LlamaConfig
from ._rotary import apply_rotary
from ._tokens import join_tokens


def _norm(config: LlamaConfig, name: str) -> nn.Module:
    norm = UnitOffsetNorm if config.unit_offset else nn.RMSNorm
    return norm(epsilon=config.epsilon, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


class UnitOffsetNorm(nn.Module):
    """`x / rms(x) * (1 + scale)`, in float32: Gemma's norm, whose scale starts from zeros."""

    epsilon: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes the last axis."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * inverse * (1.0 + scale.astype(jnp.float32))).astype(self.dtype)


class LlamaAttention(nn.Module):
    """Grouped-query attention with `nn.DenseGeneral` projections."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, view: LayerView, cache: tuple | None, windowed: jax.Array | None = None
    ) -> tuple[jax.Array, tuple | None]:
        """Attends from `x` `[batch, length, width]` to itself or, with a cache, to that and itself."""
        config = self.config
        options = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        sin, cos, mask = view.at(windowed)
        rows = join_tokens(x)

        def heads(count, name):
            split = nn.DenseGeneral((count, config.head_dim), use_bias=config.qkv_bias, name=name, **options)
            return split(rows).reshape(*x.shape[:-1], count, config.head_dim)

        def turned(count, name):
            found = heads(count, name)
            return apply_rotary(_norm(config, f"{name}_norm")(found) if config.qk_norm else found, sin, cos)

        query = turned(config.num_heads, "query")
        key = turned(config.num_kv_heads, "key")
        value = heads(config.num_kv_heads, "value")
        if cache is not None:
            start = (0, view.offset, 0, 0)
            key = jax.lax.dynamic_update_slice(cache[0], key, start)
            value = jax.lax.dynamic_update_slice(cache[1], value, start)
            cache = (key, value)
        mixed = attend(
            query,
            key,
            value,
            mask,
            implementation=config.attention,
            is_causal=mask is None,
            scale=config.attention_scale,
        )
        output = nn.DenseGeneral(config.width, axis=(-2, -1), use_bias=config.output_bias, name="output", **options)
        return output(mixed.reshape(*rows.shape[:-1], *mixed.shape[-2:])).reshape(x.shape), cache


class LlamaMlp(nn.Module):
    """`down(f(gate(x)) * up(x))`."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., width]` to `[..., width]`."""
        config = self.config
        options = {"use_bias": config.mlp_bias, "dtype": config.dtype, "param_dtype": config.param_dtype}
        rows = join_tokens(x)
        gate = nn.Dense(config.mlp_width, name="gate", **options)(rows)
        up = nn.Dense(config.mlp_width, name="up", **options)(rows)
        opened = nn.silu(gate) if config.activation == "silu" else nn.gelu(gate, approximate=True)
        return nn.Dense(config.width, name="down", **options)(opened * up).reshape(x.shape)


class LlamaLayer(nn.Module):
    """Pre-norm attention and feed-forward with residual sums."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, view: LayerView, cache: tuple | None = None, windowed: jax.Array | None = None
    ) -> tuple[jax.Array, tuple | None]:
        """Applies one layer; also returns the layer's updated cache."""
        config = self.config

        def added(branch: jax.Array, name: str) -> jax.Array:
            return _norm(config, name)(branch) if config.post_norms else branch

        attention = LlamaAttention(config, name="attention")
        attended, cache = attention(_norm(config, "attention_norm")(x), view, cache, windowed)
        x = x + added(attended, "attention_post_norm")
        fed = LlamaMlp(config, name="mlp")(_norm(config, "mlp_norm")(x))
        return x + added(fed, "mlp_post_norm"), cache


class LlamaDecoder(nn.Module):
    """The tower of layers."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, view: LayerView, cache: tuple | None) -> tuple[jax.Array, tuple | None]:
        """Maps `[batch, length, width]` to the same shape; also returns the updated stacked cache."""
        config = self.config
        return run_layers(
            LlamaLayer,
            {"config": config},
            x,
            view,
            num_layers=config.num_layers,
            scan_layers=config.scan_layers,
            remat=config.remat,
            per_layer=_per_layer(config, cache),
        )


def _per_layer(config: LlamaConfig, cache: tuple | None) -> tuple[Any, ...]:
    """What every layer gets its slice of: the cache, and whether the window holds."""
    if not config.mixes_windows:
        return () if cache is None else (cache,)
    return cache, jnp.array(config.window_layers)


class Llama(nn.Module):
    """Causal language model: token ids to logits.

    The options of its configuration make it Mistral, Qwen 2 and 3, and Gemma 3 as well.

    Parameters (`L` is each layer, or one `layers` with a leading axis under `scan_layers`):

        embedding/embedding                             (vocab_size, width)
        decoder/layer_L/attention_norm/scale            (width,)
        decoder/layer_L/attention/query/kernel          (width, num_heads, head_dim)
        decoder/layer_L/attention/{key,value}/kernel    (width, num_kv_heads, head_dim)
        decoder/layer_L/attention/output/kernel         (num_heads, head_dim, width)
        decoder/layer_L/mlp_norm/scale                  (width,)
        decoder/layer_L/mlp/{gate,up}/kernel            (width, mlp_width)
        decoder/layer_L/mlp/down/kernel                 (mlp_width, width)
        decoder/layer_L/attention/{query,key}_norm/scale    (head_dim,), with `qk_norm`
        decoder/layer_L/{attention,mlp}_post_norm/scale     (width,), with `post_norms`
        norm/scale                                      (width,)
        head/kernel                                     (width, vocab_size), without `tie_embeddings`

    Source: Hugo Touvron and others, "LLaMA: Open and Efficient Foundation Language Models", 2023.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from subspace_jax.models import Llama, small_llama
        >>> model = Llama(small_llama())
        >>> tokens = jnp.ones((2, 5), jnp.int32)
        >>> params = model.init(jax.random.key(0), tokens)["params"]
        >>> model.apply({"params": params}, tokens).shape
        (2, 5, 101)
    """

    config: LlamaConfig

    @overload
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        cache: None = None,
        *,
        segments: jax.Array | None = None,
        return_hidden: bool = False,
    ) -> jax.Array: ...

    @overload
    def __call__(self, tokens: jax.Array, mask: jax.Array | None, cache: KVCache) -> tuple[jax.Array, KVCache]: ...

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        *,
        segments: jax.Array | None = None,
        return_hidden: bool = False,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Returns logits of the next token at every place.

        Args:
            tokens: `[batch, length]` integer ids below `vocab_size`.
            mask: `[batch, length]`, true or non-zero at real tokens; all real by default. Padding may stand
              anywhere: it is not attended to and takes no position.
            cache: tokens before these; they are attended to, and these are added.
            segments: `[batch, length]` integers where several sequences are packed into a row: a token attends to
              those of its own number, and each segment's positions start at zero. Not with a cache.
            return_hidden: return the normalized hidden states in place of logits. Not with a cache.

        Returns:
            `[batch, length, vocab_size]` float32 logits, or `[batch, length, width]` hidden states; with a cache,
            the pair of logits and the new cache.

        Raises:
            ValueError: `tokens` has not two axes, more tokens than the cache could ever hold, or a cache together
              with what it excludes.
        """
        config = self.config
        if tokens.ndim != 2:
            raise ValueError(f"Llama: {tokens.shape=}; expected (batch, length)")
        if cache is not None and (segments is not None or return_hidden):
            raise ValueError("Llama: segments= and return_hidden= are for whole sequences; leave cache= out.")
        real = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        view, cache = view_sequence(config, real, cache, segments)
        if config.attention == "cudnn" and config.window is None and (mask, cache, segments) == (None, None, None):
            view = view._replace(mask=None)  # causal and nothing else, which the fused kernel knows by itself
        embedding = nn.Embed(
            config.vocab_size,
            config.width,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=nn.initializers.normal(0.02),
            name="embedding",
        )
        layer_cache = None if cache is None else (cache.keys, cache.values)
        x = embedding(tokens)
        if config.scale_embeddings:
            x = x * jnp.asarray(config.width**0.5, x.dtype)
        x, layer_cache = LlamaDecoder(config, name="decoder")(x, view, layer_cache)
        x = _norm(config, "norm")(x)
        if return_hidden:
            return x
        if config.tie_embeddings:
            logits = embedding.attend(x)
        else:
            logits = nn.Dense(
                config.vocab_size,
                use_bias=False,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                name="head",
            )(x)
        logits = logits.astype(jnp.float32)
        if cache is None or layer_cache is None:
            return logits
        return logits, cache._replace(keys=layer_cache[0], values=layer_cache[1])
