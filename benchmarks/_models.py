"""The transformer that benchmarks adapt, in Flax Linen and in Flax NNX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

Layout = Literal["unrolled", "remat", "scan", "scan+remat"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and form of the transformer.

    Attributes:
      vocabulary: rows of the embedding and columns of the head.
      width: size of the residual stream.
      heads: attention heads; `width` is a multiple of it.
      mlp_width: hidden size of the MLP.
      layers: number of blocks.
      dtype: of parameters and activations.
      layout: blocks one after the other or scanned, with or without rematerialization.
    """

    vocabulary: int = 1000
    width: int = 512
    heads: int = 8
    mlp_width: int = 2048
    layers: int = 4
    dtype: str = "float32"
    layout: Layout = "unrolled"

    @property
    def scan(self) -> bool:
        """Whether the blocks are scanned."""
        return "scan" in self.layout

    @property
    def remat(self) -> bool:
        """Whether the blocks are recomputed in the backward pass."""
        return "remat" in self.layout

    @property
    def dtypes(self) -> dict[str, Any]:
        """Keyword arguments of every layer."""
        return {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.dtype)}


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Settings of benchmarks that take training steps of the transformer.

    Attributes:
      sequences: sequences in a batch.
      length: tokens in a sequence.
      rank: of adapters, on all kernels.
    """

    vocabulary: int = 1000
    width: int = 512
    heads: int = 8
    mlp_width: int = 2048
    layers: int = 4
    dtype: str = "float32"
    sequences: int = 4
    length: int = 128
    rank: int = 8

    def model(self, layout: Layout = "unrolled") -> ModelConfig:
        """Returns the model of one layout."""
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig) if f.name != "layout"}
        return ModelConfig(**sizes, layout=layout)

    def tokens(self, length: int | None = None, *, abstract: bool = False) -> Any:
        """Returns `[sequences, length]` tokens of one seed, or their shape."""
        shape = (self.sequences, length or self.length)
        if abstract:
            return jax.ShapeDtypeStruct(shape, jnp.int32)
        return jax.random.randint(jax.random.key(2), shape, 0, self.vocabulary)


class LinenBlock(nn.Module):
    """A pre-norm block: attention, then MLP; returns a pair, as a scanned body does."""

    config: ModelConfig

    @nn.compact
    def __call__(self, h, _=None):
        """Maps `[batch, length, width]` to the same."""
        c = self.config
        y = nn.LayerNorm(**c.dtypes, name="attention_norm")(h)
        h = h + nn.MultiHeadDotProductAttention(c.heads, **c.dtypes, name="attention")(y)
        y = nn.LayerNorm(**c.dtypes, name="mlp_norm")(h)
        y = nn.gelu(nn.Dense(c.mlp_width, **c.dtypes, name="mlp_in")(y))
        return h + nn.Dense(c.width, **c.dtypes, name="mlp_out")(y), None


class LinenTransformer(nn.Module):
    """Tokens to logits."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens):
        """Maps `[batch, length]` int32 to `[batch, length, vocabulary]`."""
        c = self.config
        h = nn.Embed(c.vocabulary, c.width, **c.dtypes, name="embedding")(tokens)
        # Inside a scan nothing can be shared across iterations, so the barrier that remat adds is not needed.
        block = nn.remat(LinenBlock, prevent_cse=not c.scan) if c.remat else LinenBlock
        if c.scan:
            scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.layers)
            h, _ = scanned(c, name="layers")(h, None)
        else:
            for i in range(c.layers):
                h, _ = block(c, name=f"layer_{i}")(h)
        h = nn.LayerNorm(**c.dtypes, name="norm")(h)
        return nn.Dense(c.vocabulary, **c.dtypes, name="head")(h)


class LinearAttention(nnx.Module):
    """Multi-head attention whose projections are plain `nnx.Linear`, which `nnx.LoRA` can wrap."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        self.heads = c.heads
        self.query, self.key, self.value, self.out = (
            nnx.Linear(c.width, c.width, **c.dtypes, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x):
        """Maps `[batch, length, width]` to the same."""
        q, k, v = (f(x).reshape(*x.shape[:-1], self.heads, -1) for f in (self.query, self.key, self.value))
        return self.out(nnx.dot_product_attention(q, k, v).reshape(x.shape))


class NNXBlock(nnx.Module):
    """The block of `LinenBlock` in NNX."""

    def __init__(self, c: ModelConfig, linear_attention: bool, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(c.width, **c.dtypes, rngs=rngs)
        self.attention = (
            LinearAttention(c, rngs)
            if linear_attention
            else nnx.MultiHeadAttention(c.heads, c.width, **c.dtypes, decode=False, rngs=rngs)
        )
        self.mlp_norm = nnx.LayerNorm(c.width, **c.dtypes, rngs=rngs)
        self.mlp_in = nnx.Linear(c.width, c.mlp_width, **c.dtypes, rngs=rngs)
        self.mlp_out = nnx.Linear(c.mlp_width, c.width, **c.dtypes, rngs=rngs)

    def __call__(self, h):
        """Maps `[batch, length, width]` to the same."""
        h = h + self.attention(self.attention_norm(h))
        return h + self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(h))))


class NNXTransformer(nnx.Module):
    """The transformer of `LinenTransformer` in NNX, unrolled or with remat."""

    def __init__(self, c: ModelConfig, *, linear_attention: bool = False, rngs: nnx.Rngs):
        if c.scan:
            raise ValueError(f"layout {c.layout!r}: the NNX twin is unrolled, with or without remat.")
        self.remat = c.remat
        self.embedding = nnx.Embed(c.vocabulary, c.width, **c.dtypes, rngs=rngs)
        self.layers = nnx.List([NNXBlock(c, linear_attention, rngs) for _ in range(c.layers)])
        self.norm = nnx.LayerNorm(c.width, **c.dtypes, rngs=rngs)
        self.head = nnx.Linear(c.width, c.vocabulary, **c.dtypes, rngs=rngs)

    def __call__(self, tokens):
        """Maps `[batch, length]` int32 to `[batch, length, vocabulary]`."""
        h = self.embedding(tokens)
        run: Callable[..., Any] = nnx.remat(NNXBlock.__call__) if self.remat else NNXBlock.__call__
        for layer in self.layers:
            h = run(layer, h)
        return self.head(self.norm(h))


@dataclasses.dataclass(frozen=True)
class Plain:
    """A model as a function of its parameters.

    Attributes:
      apply: `apply(params, tokens)`, logits.
      params: its parameters, arrays or their shapes.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any


def make(build: Callable[[], Any], abstract: bool) -> Any:
    """Returns what `build` makes, compiled as one program, or its shapes only."""
    return jax.eval_shape(build) if abstract else jax.jit(build)()


def linen(config: ModelConfig, tokens: Any, *, abstract: bool = False) -> Plain:
    """Returns the Linen model with parameters of one seed.

    Args:
      config: sizes and layout.
      tokens: a batch, or its shape.
      abstract: make shapes in place of arrays.
    """
    module = LinenTransformer(config)
    zeros = jnp.zeros(tokens.shape, tokens.dtype)
    params = make(lambda: module.init(jax.random.key(0), zeros)["params"], abstract)
    return Plain(lambda params, tokens: module.apply({"params": params}, tokens), params)  # pyright: ignore


def nnx_twin(config: ModelConfig, *, abstract: bool = False) -> Plain:
    """Returns the NNX model as a function of a plain dict.

    Args:
      config: sizes and layout.
      abstract: make shapes in place of arrays.
    """

    def build() -> NNXTransformer:
        return NNXTransformer(config, rngs=nnx.Rngs(0))

    graph, _ = nnx.split(nnx.eval_shape(build))
    params = make(lambda: nnx.to_pure_dict(nnx.state(build())), abstract)
    return Plain(lambda params, tokens: nnx.merge(graph, params)(tokens), params)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy, in float32."""
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()
