"""Pooled features and linear heads for the encoders."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._bert import Bert, BertConfig
from ._config import require_choice
from ._llama import Llama
from ._llama_config import LlamaConfig
from ._vit import Vit, VitConfig

TEXT_POOLINGS = ("mean", "cls")
IMAGE_POOLINGS = ("cls", "mean", "cls+mean")


def mean_pool(hidden: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns the mean over the real tokens: `sum_t m_t h_t / max(sum_t m_t, 1)`.

    Args:
        hidden: `[batch, length, width]`.
        mask: `[batch, length]`, true or non-zero at real tokens; all real by default.

    Returns:
        `[batch, width]` in the dtype of `hidden`; zeros where a row has no real token.

    Example:
        >>> import jax.numpy as jnp
        >>> mean_pool(jnp.array([[[2.0], [4.0], [9.0]]]), jnp.array([[1, 1, 0]])).tolist()
        [[3.0]]
    """
    if mask is None:
        return hidden.mean(axis=1)
    weight = mask.astype(jnp.float32)[..., None]
    # where, not a product: an infinity or NaN at a padded place must not reach the mean.
    total = jnp.where(weight > 0, hidden.astype(jnp.float32), 0.0).sum(axis=1)
    return (total / jnp.maximum(weight.sum(axis=1), 1.0)).astype(hidden.dtype)


def pool_tokens(tokens: jax.Array, pooling: str = "cls+mean") -> jax.Array:
    """Returns one feature vector per image.

    Args:
        tokens: `[batch, 1 + patches, width]`, class token first.
        pooling: `"cls"`, `"mean"` over the patches, or `"cls+mean"`, both side by side.

    Returns:
        `[batch, width]`, or `[batch, 2 width]` for `"cls+mean"`; the dtype of `tokens`.

    Raises:
        ValueError: another `pooling`.

    Example:
        >>> import jax.numpy as jnp
        >>> pool_tokens(jnp.ones((2, 5, 8))).shape
        (2, 16)
    """
    require_choice("pool_tokens", "pooling", pooling, IMAGE_POOLINGS)
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(axis=1)
    return {"cls": cls, "mean": mean, "cls+mean": jnp.concatenate([cls, mean], axis=-1)}[pooling]


def _head(config: BertConfig | VitConfig, num_classes: int) -> nn.Dense:
    return nn.Dense(
        num_classes,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.initializers.normal(0.02),
        name="classifier",
    )


class BertClassifier(nn.Module):
    """`Bert`, pooled, and a linear head.

    Parameters: `backbone/...` as `Bert` has them, `classifier/kernel` `(width, num_classes)` and
    `classifier/bias`.

    Attributes:
        config: of the backbone.
        num_classes: number of logits.
        pooling: `"mean"` over the real tokens or `"cls"`, the first token.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from subspace_jax.models import small_bert
        >>> model = BertClassifier(small_bert(), num_classes=3)
        >>> tokens = jnp.ones((2, 5), jnp.int32)
        >>> params = model.init(jax.random.key(0), tokens)["params"]
        >>> model.apply({"params": params}, tokens).shape
        (2, 3)
    """

    config: BertConfig
    num_classes: int
    pooling: str = "mean"

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Returns logits `[batch, num_classes]` in float32; arguments as those of `Bert`."""
        require_choice("BertClassifier", "pooling", self.pooling, TEXT_POOLINGS)
        hidden = Bert(self.config, name="backbone")(tokens, mask, token_types, deterministic=deterministic)
        pooled = hidden[:, 0] if self.pooling == "cls" else mean_pool(hidden, mask)
        pooled = nn.Dropout(self.config.dropout, deterministic=deterministic)(pooled)
        return _head(self.config, self.num_classes)(pooled).astype(jnp.float32)


class LlamaClassifier(nn.Module):
    """`Llama`, its hidden state at the last real token, and a linear head without bias.

    The form in which causal language models are fine-tuned to classify: the last token has seen the whole text.
    Parameters: `backbone/...` as `Llama` has them without a head, `classifier/kernel` `(width, num_classes)`.

    Attributes:
        config: of the backbone; its embeddings are tied here, since logits of tokens are never made.
        num_classes: number of logits.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from subspace_jax.models import small_llama
        >>> model = LlamaClassifier(small_llama(), num_classes=3)
        >>> tokens = jnp.ones((2, 5), jnp.int32)
        >>> params = model.init(jax.random.key(0), tokens)["params"]
        >>> model.apply({"params": params}, tokens).shape
        (2, 3)
    """

    config: LlamaConfig
    num_classes: int

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns logits `[batch, num_classes]` in float32; arguments as those of `Llama`, padding anywhere."""
        hidden = Llama(self.config, name="backbone")(tokens, mask, return_hidden=True)
        real = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        last = tokens.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
        pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        head = nn.Dense(
            self.num_classes,
            use_bias=False,
            dtype=self.config.dtype,
            param_dtype=self.config.param_dtype,
            kernel_init=nn.initializers.normal(0.02),
            name="classifier",
        )
        return head(pooled).astype(jnp.float32)


class VitClassifier(nn.Module):
    """`Vit`, pooled, and a linear head.

    Parameters: `backbone/...` as `Vit` has them, `classifier/kernel` `(features, num_classes)` and
    `classifier/bias`.

    Attributes:
        config: of the backbone.
        num_classes: number of logits.
        pooling: see `pool_tokens`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from subspace_jax.models import small_vit
        >>> model = VitClassifier(small_vit(), num_classes=3)
        >>> images = jnp.zeros((2, 12, 12, 3))
        >>> params = model.init(jax.random.key(0), images)["params"]
        >>> model.apply({"params": params}, images).shape
        (2, 3)
    """

    config: VitConfig
    num_classes: int
    pooling: str = "cls+mean"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns logits `[batch, num_classes]` in float32 of normalized images `[batch, height, width, 3]`."""
        pooled = pool_tokens(Vit(self.config, name="backbone")(images), self.pooling)
        return _head(self.config, self.num_classes)(pooled).astype(jnp.float32)
