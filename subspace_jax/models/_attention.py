"""Scaled dot-product attention, by XLA or, on a GPU in half precision, by cuDNN's fused kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp

ATTENTIONS = ("xla", "cudnn")


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    implementation: str = "xla",
    is_causal: bool = False,
    scale: float | None = None,
) -> jax.Array:
    r"""Returns \(\mathrm{softmax}(s\,Q K^T)\,V\), head by head.

    XLA writes out the scores, `[batch, heads, length, length]`; cuDNN's kernel does not, and skips what a causal mask
    hides. It is taken where it is asked for and the device and the dtype have it (`has_fused_attention`), and gives the
    same to the rounding of half precision.

    Args:
      query: `[batch, length, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`.
      value: likewise.
      mask: bool, true where a query sees a key; broadcasts to `[batch, heads, length, keys]`.
      implementation: "xla" or "cudnn".
      is_causal: whether a query sees the keys up to its own place, and nothing else.
      scale: \(s\); `head_dim ** -0.5` if None.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of the query.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> attend(x, x, x, is_causal=True).shape
      (1, 3, 2, 4)
    """
    if implementation == "cudnn" and has_fused_attention(query):
        if mask is not None:  # it broadcasts over examples and heads alone
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=is_causal, scale=scale, implementation="cudnn"
        )
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal, scale=scale)


def has_fused_attention(query: jax.Array) -> bool:
    """Tells whether cuDNN's kernel takes such queries: on a GPU, in half precision, heads of a multiple of 8 up to 128.

    Args:
      query: `[batch, length, heads, head_dim]`.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return jax.default_backend() == "gpu" and half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
