"""BERT: a post-norm text encoder (Devlin, Chang, Lee, Toutanova, 2019)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ._attention import ATTENTIONS, attend, has_fused_attention
from ._config import require_choice, require_divisible, require_positive
from ._layers import run_layers
from ._tokens import join_tokens


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and options of a `Bert`.

    Attributes:
        vocab_size: number of token ids.
        width: size of a hidden state.
        num_layers: number of layers.
        num_heads: attention heads; divides `width`.
        mlp_width: size inside the feed-forward part.
        max_positions: longest sequence.
        num_token_types: number of segment ids.
        epsilon: of every layer norm.
        padding_position: RoBERTa's way of counting: real tokens from one above this, padding at it; None counts places
          from zero.
        dropout: rate on embeddings, attention probabilities and both residual branches.
        scan_layers: keep the layers' parameters stacked and loop with `nn.scan`.
        remat: recompute each layer in the backward pass.
        attention: `"xla"`, or `"cudnn"` for cuDNN's fused attention where the device and the dtype have it.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    vocab_size: int = 30522
    width: int = 384
    num_layers: int = 6
    num_heads: int = 12
    mlp_width: int = 1536
    max_positions: int = 512
    num_token_types: int = 2
    epsilon: float = 1e-12
    padding_position: int | None = None
    dropout: float = 0.0
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
            "mlp_width",
            "max_positions",
            "num_token_types",
        )
        require_divisible(self, "width", "num_heads")
        require_choice("BertConfig", "attention", self.attention, ATTENTIONS)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"BertConfig.dropout={self.dropout}; expected 0 <= dropout < 1")

    @property
    def longest(self) -> int:
        """Most tokens of a sequence."""
        return self.max_positions - (0 if self.padding_position is None else self.padding_position + 1)


def small_bert(**overrides: Any) -> BertConfig:
    """Returns a tiny `BertConfig` for tests and examples: width 32, 2 layers, 101 token ids.

    Args:
        **overrides: fields of `BertConfig` to set otherwise.

    Returns:
        The configuration.

    Example:
        >>> small_bert(num_layers=3).num_layers
        3
    """
    sizes = {
        "vocab_size": 101,
        "width": 32,
        "num_layers": 2,
        "num_heads": 4,
        "mlp_width": 64,
        "max_positions": 32,
    }
    return BertConfig(**{**sizes, **overrides})


def _dense(config: BertConfig, features: int, name: str) -> nn.Dense:
    return nn.Dense(
        features,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.initializers.normal(0.02),
        name=name,
    )


def _norm(config: BertConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=config.epsilon,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        use_fast_variance=False,
        name=name,
    )


def _embed(config: BertConfig, rows: int, name: str) -> nn.Embed:
    return nn.Embed(
        rows,
        config.width,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        embedding_init=nn.initializers.normal(0.02),
        name=name,
    )


class BertEmbeddings(nn.Module):
    """Sum of word, position and token-type embeddings, normalized."""

    config: BertConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, tokens: jax.Array, token_types: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeds `tokens` `[batch, length]`, real where `mask` is true; returns `[batch, length, width]`."""
        config = self.config
        words = _embed(config, config.vocab_size, "word")(tokens)
        places = jnp.arange(tokens.shape[-1])
        if config.padding_position is not None:
            places = config.padding_position + jnp.cumsum(mask, axis=1) * mask
        positions = _embed(config, config.max_positions, "position")(places)
        types = _embed(config, config.num_token_types, "token_type")(token_types)
        x = _norm(config, "norm")(words + positions + types)
        return nn.Dropout(config.dropout, deterministic=self.deterministic)(x)


class BertAttention(nn.Module):
    """Multi-head self-attention with `nn.Dense` projections `query`, `key`, `value`, `output`."""

    config: BertConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Attends within `x` `[batch, length, width]` where `mask` `[batch, 1, 1, length]` is true."""
        config = self.config
        heads = (*x.shape[:-1], config.num_heads, config.width // config.num_heads)
        rows = join_tokens(x)
        query, key, value = (
            _dense(config, config.width, name)(rows).reshape(heads) for name in ("query", "key", "value")
        )
        use_dropout = config.dropout > 0.0 and not self.deterministic
        if config.attention == "cudnn" and has_fused_attention(query) and not use_dropout:
            mixed = attend(query, key, value, mask, implementation="cudnn")
        else:
            mixed = nn.dot_product_attention(
                query,
                key,
                value,
                mask=mask,
                broadcast_dropout=False,
                dropout_rate=config.dropout,
                dropout_rng=self.make_rng("dropout") if use_dropout else None,
                deterministic=not use_dropout,
                dtype=config.dtype,
                force_fp32_for_softmax=True,
            )
        return _dense(config, config.width, "output")(mixed.reshape(rows.shape)).reshape(x.shape)


class BertMlp(nn.Module):
    """`fc2(gelu(fc1(x)))` with the exact (erf) GELU."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., width]` to `[..., width]`."""
        hidden = nn.gelu(_dense(self.config, self.config.mlp_width, "fc1")(join_tokens(x)), approximate=False)
        return _dense(self.config, self.config.width, "fc2")(hidden).reshape(x.shape)


class BertLayer(nn.Module):
    """Attention and feed-forward, each followed by residual sum and norm."""

    config: BertConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """Applies one layer; the second result is what a scan would collect, here nothing."""
        config = self.config
        dropout = nn.Dropout(config.dropout, deterministic=self.deterministic)
        attended = BertAttention(config, self.deterministic, name="attention")(x, mask)
        x = _norm(config, "attention_norm")(x + dropout(attended))
        x = _norm(config, "mlp_norm")(x + dropout(BertMlp(config, name="mlp")(x)))
        return x, None


class BertEncoder(nn.Module):
    """The tower of layers."""

    config: BertConfig
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps `[batch, length, width]` to the same shape."""
        config = self.config
        x, _ = run_layers(
            BertLayer,
            {"config": config, "deterministic": self.deterministic},
            x,
            mask,
            num_layers=config.num_layers,
            scan_layers=config.scan_layers,
            remat=config.remat,
        )
        return x


class Bert(nn.Module):
    """BERT without a head: token ids to hidden states.

    Parameters (`L` is each layer, or one `layers` with a leading axis under `scan_layers`):

        embeddings/{word,position,token_type}/embedding        (rows, width)
        embeddings/norm/{scale,bias}                           (width,)
        encoder/layer_L/attention/{query,key,value,output}/kernel   (width, width), bias (width,)
        encoder/layer_L/attention_norm/{scale,bias}            (width,)
        encoder/layer_L/mlp/fc1/kernel                         (width, mlp_width), bias (mlp_width,)
        encoder/layer_L/mlp/fc2/kernel                         (mlp_width, width), bias (width,)
        encoder/layer_L/mlp_norm/{scale,bias}                  (width,)

    Source: Jacob Devlin, Ming-Wei Chang, Kenton Lee, Kristina Toutanova, "BERT: Pre-training of Deep
    Bidirectional Transformers for Language Understanding", 2019.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = Bert(small_bert())
        >>> tokens = jnp.ones((2, 5), jnp.int32)
        >>> params = model.init(jax.random.key(0), tokens)["params"]
        >>> model.apply({"params": params}, tokens).shape
        (2, 5, 32)
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Encodes a batch of token ids.

        Args:
            tokens: `[batch, length]` integer ids below `vocab_size`.
            mask: `[batch, length]`, true or non-zero at real tokens; all real by default.
            token_types: `[batch, length]` segment ids; zero by default.
            deterministic: False draws dropout from the `dropout` random stream.

        Returns:
            `[batch, length, width]` hidden states, `config.dtype`.

        Raises:
            ValueError: the sequence is longer than `max_positions`.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.config.longest:
            raise ValueError(
                f"Bert: {tokens.shape=}; expected (batch, length) with length <= {self.config.longest}: truncate the "
                "texts"
            )
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = BertEmbeddings(self.config, deterministic, name="embeddings")(tokens, token_types, mask)
        return BertEncoder(self.config, deterministic, name="encoder")(x, mask[:, None, None, :])
