"""The network: frames and symbols in, frames at any time out."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import check_int

from ._symbols import vocabulary


@dataclasses.dataclass(frozen=True)
class LemonConfig:
    """Sizes of a `Lemon`; the defaults are the publication's.

    Attributes:
      points: values of a frame.
      width: of a token.
      ffn: width inside the feed-forward parts.
      heads: of attention; divide `width`.
      layers: of the data encoder, the symbol encoder, the fusion and the decoder.
      tokens: size of the vocabulary.
      dtype: of the computation; scores of attention and norms are float32 in any case.

    Example:
      >>> LemonConfig(points=32, width=64, ffn=256, heads=4, layers=(1, 1, 2, 2)).tokens
      1053
    """

    points: int = 128
    width: int = 512
    ffn: int = 2048
    heads: int = 8
    layers: tuple[int, int, int, int] = (2, 4, 8, 8)
    tokens: int = len(vocabulary())
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name in ("points", "width", "ffn", "heads", "tokens"):
            check_int(f"LemonConfig: {name}", getattr(self, name))
        for count in self.layers:
            check_int("LemonConfig: layers", count)
        if len(self.layers) != 4 or self.width % self.heads or self.width % 2:
            raise ValueError(
                f"LemonConfig: width={self.width}, heads={self.heads}, layers={self.layers}; expected an even width "
                "that the heads divide, and four depths."
            )


class _Mlp(nn.Module):
    config: LemonConfig
    out: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.config.width, dtype=self.config.dtype, name="dense_0")(x)
        return nn.Dense(self.out, dtype=self.config.dtype, name="dense_1")(nn.gelu(x, approximate=False))


class _Attention(nn.Module):
    config: LemonConfig

    @nn.compact
    def __call__(self, x: jax.Array, memory: jax.Array, mask: jax.Array | None) -> jax.Array:
        """`x` `[n, q, width]` reads `memory` `[n, k, width]` where `mask` `[n, k]` is true."""
        c = self.config
        split = (c.heads, c.width // c.heads)

        def heads(name: str, value: jax.Array) -> jax.Array:
            return nn.Dense(c.width, dtype=c.dtype, name=name)(value).reshape(*value.shape[:-1], *split)

        query, key, value = heads("query", x), heads("key", memory), heads("value", memory)
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key, preferred_element_type=jnp.float32) / np.sqrt(split[1])
        if mask is not None:
            scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        shares = jax.nn.softmax(scores, axis=-1).astype(c.dtype)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", shares, value).reshape(x.shape)
        return nn.Dense(c.width, dtype=c.dtype, name="output")(mixed)


class _Layer(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual. With a memory it reads that and not itself."""

    config: LemonConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, memory: jax.Array | None = None) -> jax.Array:
        c = self.config
        normed = nn.LayerNorm(epsilon=1e-5, dtype=c.dtype, name="norm_0")(x)
        x = x + _Attention(c, name="attention")(normed, normed if memory is None else memory, mask)
        normed = nn.LayerNorm(epsilon=1e-5, dtype=c.dtype, name="norm_1")(x)
        hidden = nn.gelu(nn.Dense(c.ffn, dtype=c.dtype, name="ffn_in")(normed), approximate=False)
        return x + nn.Dense(c.width, dtype=c.dtype, name="ffn_out")(hidden)


class _Stack(nn.Module):
    config: LemonConfig
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None, memory: jax.Array | None = None) -> jax.Array:
        for i in range(self.depth):
            x = _Layer(self.config, name=f"layer_{i}")(x, mask, memory)
        return nn.LayerNorm(epsilon=1e-5, dtype=self.config.dtype, name="norm")(x)


class Lemon(nn.Module):
    """Predicts frames of a solution at any times, from earlier frames and the equation as tokens.

    Frames become one token each; tokens of the equation are encoded beside them, both are fused by self-attention over
    all of them, and each query time reads the result by cross-attention alone, so that query times know nothing of each
    other.

    Attributes:
      config: sizes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = Lemon(LemonConfig(points=8, width=16, ffn=32, heads=2, layers=(1, 1, 1, 1)))
      >>> u, times, queries = jnp.ones((2, 4, 8)), jnp.arange(4.0), jnp.array([4.0, 5.0])
      >>> tokens, mask = jnp.ones((2, 5), int), jnp.ones((2, 5), bool)
      >>> params = model.init(jax.random.key(0), u, times, queries, tokens, mask)["params"]
      >>> model.apply({"params": params}, u, times, queries, tokens, mask).shape
      (2, 2, 8)
    """

    config: LemonConfig

    def setup(self) -> None:
        """Makes the parts."""
        c = self.config
        self.frames_mlp, self.time_mlp = _Mlp(c, c.width), _Mlp(c, c.width)
        self.query_mlp, self.output_mlp = _Mlp(c, c.width), _Mlp(c, c.points)
        self.words = nn.Embed(c.tokens, c.width, dtype=c.dtype, embedding_init=nn.initializers.normal(0.02))
        self.types = self.param("types", nn.initializers.normal(0.02), (2, c.width))
        self.patch = self.param("patch", nn.initializers.normal(0.02), (1, c.width))
        names = ("data_encoder", "symbol_encoder", "fusion", "decoder")
        self.data_encoder, self.symbol_encoder, self.fusion, self.decoder = (
            _Stack(c, depth, name=name) for name, depth in zip(names, c.layers, strict=True)
        )

    def __call__(
        self, u: jax.Array, times: jax.Array, queries: jax.Array, tokens: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Predicts.

        Args:
          u: frames, normalized by `input_statistics`, `[n, frames, points]`.
          times: of the frames, `[frames]` or `[n, frames]`, in [0, 2].
          queries: times that are asked for, `[queries]` or `[n, queries]`.
          tokens: of the equations, `[n, length]`, 0 where padded.
          mask: true where they are valid.

        Returns:
          Normalized frames, float32 `[n, queries, points]`.
        """
        count = u.shape[0]
        data = self.frames_mlp(u.astype(self.config.dtype)) + self.time_mlp(_column(times, count))
        data = self.data_encoder(data)
        symbols = self.encode_symbols(tokens, mask)
        types = self.types.astype(data.dtype)
        whole = jnp.concatenate([data + types[0], symbols + types[1]], axis=1)
        valid = jnp.concatenate([jnp.ones(data.shape[:2], bool), mask], axis=1)
        memory = self.fusion(whole, valid)
        asked = self.query_mlp(_column(queries, count)) + self.patch[0].astype(data.dtype)
        return self.output_mlp(self.decoder(asked, valid, memory)).astype(jnp.float32)

    def encode_symbols(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Returns the encoding of equations alone, `[n, length, width]`."""
        words = self.words(tokens)
        return self.symbol_encoder(words + positions(tokens.shape[1], self.config.width).astype(words.dtype), mask)


def _column(times: jax.Array, count: int) -> jax.Array:
    return jnp.broadcast_to(times, (count, times.shape[-1]))[..., None]


def positions(length: int, width: int) -> jax.Array:
    """Returns sines, then cosines of places at wave lengths from 2 pi to 10,000 times that, `[length, width]`.

    Args:
      length: of the sequence.
      width: even.

    Example:
      >>> positions(2, 4).shape
      (2, 4)
    """
    rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * rates
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1), jnp.float32)
