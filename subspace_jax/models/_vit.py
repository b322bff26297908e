"""Vision transformer in the DINOv2 layout: pre-norm, LayerScale, class token, resizable positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._attention import ATTENTIONS, attend
from ._config import require_choice, require_divisible, require_positive
from ._layers import run_layers
from ._position import resize_positions
from ._tokens import join_tokens

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Sizes and options of a `Vit`.

    Attributes:
        patch_size: side of a square patch in pixels; divides both sides of every image.
        position_grid: side of the square grid that the position table was trained on.
        width: size of a token.
        num_layers: number of blocks.
        num_heads: attention heads; divides `width`.
        mlp_width: size inside the feed-forward part.
        epsilon: of every layer norm.
        final_norm: normalize the tokens after the last block.
        layer_scale: a learned factor per feature on what each block adds.
        scan_layers: keep the blocks' parameters stacked and loop with `nn.scan`.
        remat: recompute each block in the backward pass.
        attention: `"xla"`, or `"cudnn"` for cuDNN's fused attention where the device and the dtype have it.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    patch_size: int = 14
    position_grid: int = 37
    width: int = 384
    num_layers: int = 12
    num_heads: int = 6
    mlp_width: int = 1536
    epsilon: float = 1e-6
    final_norm: bool = True
    layer_scale: bool = True
    scan_layers: bool = False
    remat: bool = False
    attention: str = "xla"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        require_positive(self, "patch_size", "position_grid", "width", "num_layers", "num_heads", "mlp_width")
        require_divisible(self, "width", "num_heads")
        require_choice("VitConfig", "attention", self.attention, ATTENTIONS)


def small_vit(**overrides: Any) -> VitConfig:
    """Returns a tiny `VitConfig` for tests and examples: width 32, 2 blocks, patches of 4, positions 3 x 3.

    Args:
        **overrides: fields of `VitConfig` to set otherwise.

    Returns:
        The configuration.

    Example:
        >>> small_vit(scan_layers=True).scan_layers
        True
    """
    sizes = {
        "patch_size": 4,
        "position_grid": 3,
        "width": 32,
        "num_layers": 2,
        "num_heads": 4,
        "mlp_width": 64,
    }
    return VitConfig(**{**sizes, **overrides})


def normalize_images(images: Any) -> jax.Array:
    """Subtracts ImageNet's mean and divides by its standard deviation, per channel.

    Args:
        images: `[batch, height, width, 3]`, or with one channel, which is repeated; integers 0-255 or
            floats 0-1.

    Returns:
        `[batch, height, width, 3]` float32, what `Vit` takes.

    Raises:
        ValueError: another number of axes or channels.

    Example:
        >>> import numpy as np
        >>> normalize_images(np.zeros((1, 28, 28, 1), np.uint8)).shape
        (1, 28, 28, 3)
    """
    pixels = jnp.asarray(images)
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        raise ValueError(f"{pixels.shape=}; expected (batch, height, width, 1 or 3): add the channel axis")
    unit = pixels.astype(jnp.float32) / (255.0 if jnp.issubdtype(pixels.dtype, jnp.integer) else 1.0)
    return (unit - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)


def _norm(config: VitConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=config.epsilon,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        use_fast_variance=False,
        name=name,
    )


class VitEmbeddings(nn.Module):
    """Patches by a strided convolution, class token in front, positions added."""

    config: VitConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, 3]` to `[batch, 1 + patches, width]`."""
        config = self.config
        small = nn.initializers.normal(0.02)
        patches = nn.Conv(
            config.width,
            (config.patch_size, config.patch_size),
            strides=config.patch_size,
            padding="VALID",
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            name="patch",
        )(images)
        table_size = 1 + config.position_grid**2
        cls = self.param("cls", small, (1, 1, config.width), config.param_dtype)
        positions = self.param("position", small, (1, table_size, config.width), config.param_dtype)
        grid = (config.position_grid, config.position_grid, config.width)
        batch, rows, columns, _ = patches.shape
        resized = resize_positions(positions[0, 1:].reshape(grid), (rows, columns)).astype(config.dtype)
        tokens = (patches + resized).reshape(batch, rows * columns, config.width)
        first = (cls + positions[:, :1]).astype(config.dtype)
        return jnp.concatenate([jnp.broadcast_to(first, (batch, 1, config.width)), tokens], axis=1)


class VitAttention(nn.Module):
    """Multi-head self-attention with `nn.DenseGeneral` projections."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Attends within `x` `[batch, length, width]`."""
        config = self.config
        heads = (config.num_heads, config.width // config.num_heads)
        types = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        rows, split = join_tokens(x), (*x.shape[:-1], *heads)
        query, key, value = (
            nn.DenseGeneral(heads, name=name, **types)(rows).reshape(split) for name in ("query", "key", "value")
        )
        mixed = attend(query, key, value, implementation=config.attention).reshape(*rows.shape[:-1], *heads)
        return nn.DenseGeneral(config.width, axis=(-2, -1), name="output", **types)(mixed).reshape(x.shape)


class VitMlp(nn.Module):
    """`fc2(gelu(fc1(x)))` with the exact (erf) GELU."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., width]` to `[..., width]`."""
        types = {"dtype": self.config.dtype, "param_dtype": self.config.param_dtype}
        hidden = nn.gelu(nn.Dense(self.config.mlp_width, name="fc1", **types)(join_tokens(x)), approximate=False)
        return nn.Dense(self.config.width, name="fc2", **types)(hidden).reshape(x.shape)


class LayerScale(nn.Module):
    """A learned factor per feature on a residual branch (Touvron and others, 2021)."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales the last axis of `x`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        return x * scale.astype(x.dtype)


class VitBlock(nn.Module):
    """`x + s1 attention(norm1(x))`, then `x + s2 mlp(norm2(x))`."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """Applies one block; the second result is what a scan would collect, here nothing."""
        config = self.config
        attended = VitAttention(config, name="attention")(_norm(config, "norm1")(x))

        def scaled(branch: jax.Array, name: str) -> jax.Array:
            return LayerScale(config, name=name)(branch) if config.layer_scale else branch

        x = x + scaled(attended, "layer_scale1")
        mixed = VitMlp(config, name="mlp")(_norm(config, "norm2")(x))
        return x + scaled(mixed, "layer_scale2"), None


class VitEncoder(nn.Module):
    """The tower of blocks."""

    config: VitConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, length, width]` to the same shape."""
        config = self.config
        x, _ = run_layers(
            VitBlock,
            {"config": config},
            x,
            num_layers=config.num_layers,
            scan_layers=config.scan_layers,
            remat=config.remat,
        )
        return x


class Vit(nn.Module):
    """Vision transformer without a head: images to tokens.

    Parameters (`L` is each block, or one `layers` with a leading axis under `scan_layers`; `heads` times
    `head_dim` is `width`):

        embeddings/patch/kernel                             (patch, patch, 3, width), bias (width,)
        embeddings/cls                                      (1, 1, width)
        embeddings/position                                 (1, 1 + position_grid^2, width)
        encoder/layer_L/norm1/{scale,bias}                  (width,)
        encoder/layer_L/attention/{query,key,value}/kernel  (width, heads, head_dim), bias (heads, head_dim)
        encoder/layer_L/attention/output/kernel             (heads, head_dim, width), bias (width,)
        encoder/layer_L/layer_scale1/scale                  (width,)
        encoder/layer_L/norm2/{scale,bias}                  (width,)
        encoder/layer_L/mlp/fc1/kernel                      (width, mlp_width), bias (mlp_width,)
        encoder/layer_L/mlp/fc2/kernel                      (mlp_width, width), bias (width,)
        encoder/layer_L/layer_scale2/scale                  (width,)
        norm/{scale,bias}                                   (width,), with `final_norm`

    Sources: Alexey Dosovitskiy and others, "An Image is Worth 16x16 Words", 2021; Maxime Oquab and others,
    "DINOv2: Learning Robust Visual Features without Supervision", 2023.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = Vit(small_vit())
        >>> images = jnp.zeros((2, 8, 12, 3))
        >>> params = model.init(jax.random.key(0), images)["params"]
        >>> model.apply({"params": params}, images).shape
        (2, 7, 32)
    """

    config: VitConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Encodes normalized images.

        Args:
            images: `[batch, height, width, 3]`, see `normalize_images`; both sides multiples of `patch_size`.

        Returns:
            `[batch, 1 + patches, width]` tokens, class token first, patches row by row; `config.dtype`.

        Raises:
            ValueError: wrong axes or channels, or a side that is not a multiple of `patch_size`.
        """
        config = self.config
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"Vit: {images.shape=}; expected (batch, height, width, 3)")
        if images.shape[1] % config.patch_size or images.shape[2] % config.patch_size:
            raise ValueError(
                f"Vit: {images.shape=}; expected height and width to be multiples of "
                f"patch_size={config.patch_size}: resize or crop the images"
            )
        x = VitEmbeddings(config, name="embeddings")(images.astype(config.dtype))
        x = VitEncoder(config, name="encoder")(x)
        return _norm(config, "norm")(x) if config.final_norm else x
