"""Sizes and options of a Llama."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ._attention import ATTENTIONS
from ._config import require_choice, require_divisible, require_positive
from ._rotary import RopeScaling

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a `Llama`.

    Attributes:
        vocab_size: number of token ids.
        width: size of a hidden state.
        num_layers: number of layers.
        num_heads: query heads; divides `width` where no `head_size` is given.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_size: even size of a head; `width / num_heads` if None.
        mlp_width: size inside the gated feed-forward part.
        max_positions: longest sequence that `greedy_decode` accepts.
        epsilon: of every RMS norm.
        rope_base: of the rotary frequencies.
        rope_scaling: how the frequencies are changed for long texts; None leaves them.
        window: a token attends to so many tokens, itself and those before it; None to all before it.
        window_layers: for every layer whether `window` holds there; None means in all of them.
        window_rope_base: of the frequencies in layers with the window, which are not scaled; `rope_base` if None.
        qkv_bias: queries, keys and values have biases.
        output_bias: the attention's output has one.
        mlp_bias: the feed-forward part has biases.
        qk_norm: normalize each head's query and key before they are turned.
        post_norms: normalize what attention and feed-forward part add, too.
        unit_offset: norms multiply by `1 + scale`, as Gemma's do.
        scale_embeddings: multiply embeddings by the root of `width`.
        activation: of the gate: `"silu"`, or `"gelu_tanh"`.
        attention_scale: factor of the scores; `head_dim ** -0.5` if None.
        tie_embeddings: logits by the transposed embedding table; otherwise by a `head` of its own.
        scan_layers: keep the layers' parameters stacked and loop with `nn.scan`.
        remat: recompute each layer in the backward pass.
        attention: `"xla"`, or `"cudnn"` for cuDNN's fused attention where the device and the dtype have it.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    vocab_size: int = 49152
    width: int = 576
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    head_size: int | None = None
    mlp_width: int = 1536
    max_positions: int = 8192
    epsilon: float = 1e-5
    rope_base: float = 100000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    window_rope_base: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    unit_offset: bool = False
    scale_embeddings: bool = False
    activation: str = "silu"
    attention_scale: float | None = None
    tie_embeddings: bool = True
    scan_layers: bool = False
    remat: bool = False
    attention: str = "xla"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        require_positive(
            self,
            "vocab_size",
            "width",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "mlp_width",
            "max_positions",
        )
        if self.head_size is None:
            require_divisible(self, "width", "num_heads")
        require_divisible(self, "num_heads", "num_kv_heads")
        require_choice("LlamaConfig", "activation", self.activation, ACTIVATIONS)
        require_choice("LlamaConfig", "attention", self.attention, ATTENTIONS)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"LlamaConfig: {self.head_dim=} (width / num_heads); rotary embedding needs it even")
        if self.window is not None and self.window < 1:
            raise ValueError(f"LlamaConfig.window={self.window}; expected a positive number of tokens, or None")
        if self.window_layers is not None and (len(self.window_layers) != self.num_layers or self.window is None):
            raise ValueError(
                f"LlamaConfig.window_layers: {len(self.window_layers)} layers and window={self.window}; expected one "
                f"entry for each of the {self.num_layers} layers, and a window"
            )

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.width // self.num_heads if self.head_size is None else self.head_size

    @property
    def mixes_windows(self) -> bool:
        """Whether layers differ in what they attend to."""
        return self.window_layers is not None and len(set(self.window_layers)) > 1

    @property
    def window_everywhere(self) -> bool:
        """Whether every layer has the window."""
        return self.window is not None and (self.window_layers is None or all(self.window_layers))


def small_llama(**overrides: Any) -> LlamaConfig:
    """Returns a tiny `LlamaConfig` for tests and examples: width 32, 2 layers, 4 query and 2 key heads, 101 ids.

    Args:
        **overrides: fields of `LlamaConfig` to set otherwise.

    Returns:
        The configuration.

    Example:
        >>> small_llama().head_dim
        8
    """
    sizes = {
        "vocab_size": 101,
        "width": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "mlp_width": 64,
        "max_positions": 64,
        "rope_base": 10000.0,
    }
    return LlamaConfig(**{**sizes, **overrides})
