"""Sizes and options of a Llama."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ._config import require_divisible, require_positive


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a `Llama`.

    Attributes:
        vocab_size: number of token ids.
        width: size of a hidden state.
        num_layers: number of layers.
        num_heads: query heads; divides `width`, and the head size is even.
        num_kv_heads: key and value heads; divides `num_heads`.
        mlp_width: size inside the gated feed-forward part.
        max_positions: longest sequence that `greedy_decode` accepts.
        epsilon: of every RMS norm.
        rope_base: of the rotary frequencies.
        tie_embeddings: logits by the transposed embedding table; otherwise by a `head` of its own.
        scan_layers: keep the layers' parameters stacked and loop with `nn.scan`.
        remat: recompute each layer in the backward pass.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    vocab_size: int = 49152
    width: int = 576
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    mlp_width: int = 1536
    max_positions: int = 8192
    epsilon: float = 1e-5
    rope_base: float = 100000.0
    tie_embeddings: bool = True
    scan_layers: bool = False
    remat: bool = False
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
        require_divisible(self, "width", "num_heads")
        require_divisible(self, "num_heads", "num_kv_heads")
        if self.head_dim % 2:
            raise ValueError(f"LlamaConfig: {self.head_dim=} (width / num_heads); rotary embedding needs it even")

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.width // self.num_heads


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
