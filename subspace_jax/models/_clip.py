"""CLIP: texts and images in one space (Radford and others, 2021)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._attention import attend
from ._clip_config import ClipConfig, ClipTower
from ._layers import run_layers

# Mean and standard deviation of the channels of the images that the authors trained on.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_clip_images(images: Any) -> jax.Array:
    """Subtracts the mean of CLIP's own images and divides by their standard deviation, per channel.

    Args:
        images: `[batch, height, width, 3]`; integers 0-255 or floats 0-1.

    Returns:
        float32 of the same shape, what `Clip` takes.

    Example:
        >>> import numpy as np
        >>> normalize_clip_images(np.zeros((1, 4, 4, 3), np.uint8)).shape
        (1, 4, 4, 3)
    """
    pixels = jnp.asarray(images)
    unit = pixels.astype(jnp.float32) / (255.0 if jnp.issubdtype(pixels.dtype, jnp.integer) else 1.0)
    return (unit - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)


def _norm(config: ClipConfig, tower: ClipTower, name: str) -> nn.LayerNorm:
    types = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    return nn.LayerNorm(epsilon=tower.epsilon, use_fast_variance=False, name=name, **types)


class ClipAttention(nn.Module):
    """Multi-head self-attention with `nn.DenseGeneral` projections."""

    config: ClipConfig
    tower: ClipTower

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Attends within `x` `[batch, length, width]` to places where `mask` `[batch, 1, length, length]` is true."""
        heads = (self.tower.num_heads, self.tower.width // self.tower.num_heads)
        types = {"dtype": self.config.dtype, "param_dtype": self.config.param_dtype}
        query, key, value = (nn.DenseGeneral(heads, name=name, **types)(x) for name in ("query", "key", "value"))
        mixed = attend(query, key, value, mask, implementation=self.config.attention)
        return nn.DenseGeneral(self.tower.width, axis=(-2, -1), name="output", **types)(mixed)


class ClipMlp(nn.Module):
    """`fc2(f(fc1(x)))`."""

    config: ClipConfig
    tower: ClipTower

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., width]` to `[..., width]`."""
        types = {"dtype": self.config.dtype, "param_dtype": self.config.param_dtype}
        hidden = nn.Dense(self.tower.mlp_width, name="fc1", **types)(x)
        quick = self.tower.activation == "quick_gelu"
        hidden = hidden * nn.sigmoid(1.702 * hidden) if quick else nn.gelu(hidden, approximate=False)
        return nn.Dense(self.tower.width, name="fc2", **types)(hidden)


class ClipLayer(nn.Module):
    """`x + attention(norm1(x))`, then `x + mlp(norm2(x))`."""

    config: ClipConfig
    tower: ClipTower

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, None]:
        """Applies one layer; the second result is what a scan would collect, here nothing."""
        config, tower = self.config, self.tower
        x = x + ClipAttention(config, tower, name="attention")(_norm(config, tower, "norm1")(x), mask)
        return x + ClipMlp(config, tower, name="mlp")(_norm(config, tower, "norm2")(x)), None


class ClipEncoder(nn.Module):
    """A tower of layers."""

    config: ClipConfig
    tower: ClipTower

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps `[batch, length, width]` to the same shape."""
        config = self.config
        fields = {"config": config, "tower": self.tower}
        return run_layers(
            ClipLayer,
            fields,
            x,
            mask,
            num_layers=self.tower.num_layers,
            scan_layers=config.scan_layers,
            remat=config.remat,
        )[0]


def _table(config: ClipConfig, rows: int, width: int, name: str) -> nn.Embed:
    types = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    return nn.Embed(rows, width, embedding_init=nn.initializers.normal(0.02), name=name, **types)


class ClipTextEmbeddings(nn.Module):
    """Tokens and places."""

    config: ClipConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps ids `[batch, length]` to `[batch, length, width]`."""
        config, width = self.config, self.config.text.width
        places = jnp.arange(tokens.shape[1])[None]
        positions = _table(config, config.max_positions, width, "position")(places)
        return _table(config, config.vocab_size, width, "token")(tokens) + positions


class ClipText(nn.Module):
    """Texts to one hidden state each, that of their end."""

    config: ClipConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps ids `[batch, length]` to `[batch, width]`."""
        config = self.config
        if tokens.ndim != 2 or tokens.shape[1] > config.max_positions:
            raise ValueError(f"Clip: {tokens.shape=}; expected (batch, at most {config.max_positions} places)")
        length = tokens.shape[1]
        seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if mask is not None:
            seen = seen & mask.astype(bool)[:, None, None, :]
        x = ClipTextEmbeddings(config, name="embeddings")(tokens)
        x = ClipEncoder(config, config.text, name="encoder")(x, seen)
        x = _norm(config, config.text, "norm")(x)
        end = tokens if config.end_token is None else (tokens == config.end_token).astype(jnp.int32)
        return jnp.take_along_axis(x, jnp.argmax(end, axis=-1)[:, None, None], axis=1)[:, 0]


class ClipImageEmbeddings(nn.Module):
    """Patches by a strided convolution without bias, a class token in front, positions added."""

    config: ClipConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `[batch, side, side, 3]` to `[batch, 1 + patches, width]`."""
        config, width = self.config, self.config.image.width
        types = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        sides = (config.patch_size, config.patch_size)
        split = nn.Conv(width, sides, strides=config.patch_size, padding="VALID", use_bias=False, name="patch", **types)
        patches = split(images).reshape(len(images), -1, width)
        cls = self.param("cls", nn.initializers.normal(0.02), (width,), config.param_dtype).astype(config.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(images), 1, width)), patches], axis=1)
        count = 1 + config.position_grid**2
        return x + _table(config, count, width, "position")(jnp.arange(count)[None])


class ClipImage(nn.Module):
    """Images to one hidden state each, that of the class token."""

    config: ClipConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `[batch, side, side, 3]` to `[batch, width]`."""
        config = self.config
        side = config.patch_size * config.position_grid
        if images.shape[1:] != (side, side, 3):
            raise ValueError(f"Clip: {images.shape=}; expected (batch, {side}, {side}, 3): resize or crop the images")
        x = ClipImageEmbeddings(config, name="embeddings")(images.astype(config.dtype))
        x = _norm(config, config.image, "norm_before")(x)
        x = ClipEncoder(config, config.image, name="encoder")(x)
        return _norm(config, config.image, "norm")(x[:, 0])


class Clip(nn.Module):
    """Texts and images in one space.

    Parameters (`T` is `text` or `image`; `L` is each layer, or one `layers` with a leading axis under `scan_layers`):

        text/embeddings/{token,position}/embedding          (vocab_size or max_positions, width)
        image/embeddings/patch/kernel                       (patch, patch, 3, width)
        image/embeddings/cls                                (width,)
        image/embeddings/position/embedding                 (1 + position_grid^2, width)
        image/norm_before/{scale,bias}                      (width,)
        T/encoder/layer_L/{norm1,norm2}/{scale,bias}        (width,)
        T/encoder/layer_L/attention/{query,key,value}/kernel    (width, heads, head_dim), bias (heads, head_dim)
        T/encoder/layer_L/attention/output/kernel           (heads, head_dim, width), bias (width,)
        T/encoder/layer_L/mlp/fc1/kernel                    (width, mlp_width), bias (mlp_width,)
        T/encoder/layer_L/mlp/fc2/kernel                    (mlp_width, width), bias (width,)
        T/norm/{scale,bias}                                 (width,)
        T_projection/kernel                                 (width, projection)
        logit_scale                                         (), a logarithm

    Source: Alec Radford and others, "Learning Transferable Visual Models From Natural Language Supervision", 2021.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from subspace_jax.models import Clip, small_clip
        >>> model, images, tokens = Clip(small_clip()), jnp.zeros((2, 12, 12, 3)), jnp.array([[5, 7, 100]])
        >>> variables = model.init(jax.random.key(0), tokens, images)
        >>> model.apply(variables, tokens, images).shape
        (2, 1)
        >>> model.apply(variables, images, method="encode_images").shape
        (2, 24)
    """

    config: ClipConfig

    def setup(self):
        config = self.config
        types = {"use_bias": False, "dtype": config.dtype, "param_dtype": config.param_dtype}
        self.text, self.image = ClipText(config), ClipImage(config)
        self.text_projection = nn.Dense(config.projection, **types)
        self.image_projection = nn.Dense(config.projection, **types)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), (), config.param_dtype)

    def encode_text(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns what texts are in the common space, `[batch, projection]`, not normalized.

        Args:
            tokens: `[batch, length]` integer ids; a place attends to itself and those before it.
            mask: `[batch, length]`, true at real tokens; all real by default.
        """
        return self.text_projection(self.text(tokens, mask))

    def encode_images(self, images: jax.Array) -> jax.Array:
        """Returns what images are in the common space, `[batch, projection]`, not normalized.

        Args:
            images: `[batch, side, side, 3]`, see `normalize_clip_images`.
        """
        return self.image_projection(self.image(images))

    def __call__(self, tokens: jax.Array, images: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns `[images, texts]` float32 logits: cosines times the learned factor."""
        found = (self.encode_images(images), self.encode_text(tokens, mask))
        rows, columns = (v / jnp.linalg.norm(v.astype(jnp.float32), axis=-1, keepdims=True) for v in found)
        return jnp.exp(self.logit_scale.astype(jnp.float32)) * jnp.einsum("ip,tp->it", rows, columns)
