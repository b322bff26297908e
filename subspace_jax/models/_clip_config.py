"""Sizes and options of a CLIP."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ._attention import ATTENTIONS
from ._config import require_choice, require_positive

CLIP_ACTIVATIONS = ("quick_gelu", "gelu")


@dataclasses.dataclass(frozen=True)
class ClipTower:
    """Sizes and options of one tower of a `Clip`.

    Attributes:
        width: size of a hidden state.
        num_layers: number of layers.
        num_heads: attention heads; divides `width`.
        mlp_width: size inside the feed-forward part.
        activation: `"quick_gelu"`, that is `x sigmoid(1.702 x)`, or the exact `"gelu"`.
        epsilon: of every layer norm.
    """

    width: int = 512
    num_layers: int = 12
    num_heads: int = 8
    mlp_width: int = 2048
    activation: str = "quick_gelu"
    epsilon: float = 1e-5

    def __post_init__(self):
        require_positive(self, "width", "num_layers", "num_heads", "mlp_width")
        require_choice("ClipTower", "activation", self.activation, CLIP_ACTIVATIONS)
        if self.width % self.num_heads:
            raise ValueError(f"ClipTower: {self.width=}, {self.num_heads=}; expected a multiple")


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes and options of a `Clip`.

    Attributes:
        text: tower of texts.
        image: tower of images.
        vocab_size: number of token ids.
        max_positions: longest text.
        end_token: id at whose first place a text is read; None reads it at the highest id, as models did whose
            `config.json` says 2.
        patch_size: side of a patch in pixels.
        position_grid: patches along a side of an image.
        projection: size of the space of both.
        scan_layers: keep the layers' parameters stacked and loop with `nn.scan`.
        remat: recompute each layer in the backward pass.
        attention: `"xla"`, or `"cudnn"` for cuDNN's fused attention where the device and the dtype have it.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    text: ClipTower = ClipTower()
    image: ClipTower = ClipTower(width=768, num_heads=12, mlp_width=3072)
    vocab_size: int = 49408
    max_positions: int = 77
    end_token: int | None = None
    patch_size: int = 32
    position_grid: int = 7
    projection: int = 512
    scan_layers: bool = False
    remat: bool = False
    attention: str = "xla"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        require_choice("ClipConfig", "attention", self.attention, ATTENTIONS)
        require_positive(self, "vocab_size", "max_positions", "patch_size", "position_grid", "projection")


def small_clip(**overrides: Any) -> ClipConfig:
    """Returns a tiny `ClipConfig` for tests and examples: towers of width 32 with 2 layers, images of 12 pixels.

    Args:
        **overrides: fields of `ClipConfig` to set otherwise.

    Returns:
        The configuration.

    Example:
        >>> small_clip().position_grid
        3
    """
    tower = ClipTower(32, 2, 4, 64)
    sizes = {"vocab_size": 101, "max_positions": 16, "patch_size": 4, "position_grid": 3, "projection": 24}
    return ClipConfig(**{"text": tower, "image": tower, "end_token": 100, **sizes, **overrides})
