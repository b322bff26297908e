"""Networks that turn an image encoder's features into all factors at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from subspace_jax.core import check_int
from subspace_jax.methods.systems.hypernetwork._layout import Layout


class Head(nn.Module):
    """Writes one kernel's numbers, those of `a` and then of `b`, from a token of its own.

    `a` is random at the start, for every input, and `b` zero, so that the model starts as it is and `b` has a gradient:
    with both at zero neither would ever move.

    Attributes:
      first: how many numbers `a` has.
      second: how many numbers `b` has.
    """

    first: int
    second: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[..., width]` to `[..., first + second]`."""
        kernel = self.param("kernel", self._kernel, (tokens.shape[-1], self.first + self.second))
        bias = self.param("bias", self._bias, (self.first + self.second,))
        return tokens @ kernel + bias

    def _kernel(self, key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        drawn = 0.1 * nn.initializers.lecun_normal()(key, shape)
        return jnp.where(jnp.arange(shape[1]) < self.first, drawn, 0.0)

    def _bias(self, key: jax.Array, shape: tuple[int]) -> jax.Array:
        return jnp.where(jnp.arange(shape[0]) < self.first, jax.random.normal(key, shape), 0.0)


def _sizes(layout: Layout) -> list[tuple[int, int]]:
    """How many numbers `a` and `b` of every kernel have."""
    return [(layout.rank * k.inputs, layout.rank * k.outputs) for k in layout.kernels]


def _name(sizes: tuple[int, int]) -> str:
    return f"head_{sizes[0]}_{sizes[1]}"


class WeightDecoder(nn.Module):
    """A transformer with a query for every adapted kernel, which reads the features of reference images; Flax Linen.

    Layers, with norms before each part: cross-attention to the projected features, self-attention among the kernels'
    queries, and two dense layers. Kernels of one shape share a head. Features of several reference images are joined
    along their tokens.

    Parameters: `queries` `[kernels, width]`, `roles` `[names of modules, width]`, `project`, for every layer its parts,
    `norm`, and the heads.

    Attributes:
      layout: of the model's kernels.
      width: of the tokens.
      layers: number of layers.
      heads: of attention.
      ratio: hidden width of the dense layers, relative to `width`.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> home = sj.methods.hypernetwork
      >>> layout = home.layout_of({"q": jnp.ones((8, 6)), "v": jnp.ones((8, 6))}, "*", rank=2)
      >>> decoder = home.WeightDecoder(layout, width=16, layers=1, heads=2)
      >>> features = jnp.ones((3, 5, 12))
      >>> params = decoder.init(jax.random.key(0), features)["params"]
      >>> decoder.apply({"params": params}, features).shape, layout.size
      ((3, 56), 56)
    """

    layout: Layout
    width: int = 512
    layers: int = 4
    heads: int = 8
    ratio: int = 4

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Returns outputs `[n, layout.size]` of features `[n, tokens, width of the encoder]`."""
        for name in ("width", "layers", "heads", "ratio"):
            check_int(f"WeightDecoder.{name}", getattr(self, name))
        kernels = self.layout.kernels
        modules = [_module_of(k.path) for k in kernels for _ in range(k.layers)]
        names = sorted(set(modules))
        normal = nn.initializers.normal(0.02)
        queries = self.param("queries", normal, (len(modules), self.width))
        roles = self.param("roles", normal, (len(names), self.width))
        queries = queries + roles[jnp.asarray([names.index(m) for m in modules])]
        tokens = jnp.broadcast_to(queries, (features.shape[0], *queries.shape))
        memory = nn.Dense(self.width, name="project")(features)
        for i in range(self.layers):
            tokens = self._layer(tokens, memory, i)
        tokens = nn.LayerNorm(name="norm")(tokens)
        made: dict[tuple[int, int], Head] = {}
        parts, start = [], 0
        for kernel, sizes in zip(kernels, _sizes(self.layout), strict=True):
            head = made.setdefault(sizes, made.get(sizes) or Head(*sizes, name=_name(sizes)))
            parts.append(head(tokens[:, start : start + kernel.layers]).reshape(features.shape[0], -1))
            start += kernel.layers
        return jnp.concatenate(parts, axis=-1)

    def _layer(self, tokens: jax.Array, memory: jax.Array, i: int) -> jax.Array:
        def attend(name: str, read: Callable[[jax.Array], Any]) -> jax.Array:
            normed = nn.LayerNorm(name=f"{name}_norm_{i}")(tokens)
            attention = nn.MultiHeadDotProductAttention(self.heads, qkv_features=self.width, name=f"{name}_{i}")
            return tokens + attention(normed, read(normed))

        tokens = attend("cross", lambda normed: memory)
        tokens = attend("self", lambda normed: normed)
        hidden = nn.gelu(
            nn.Dense(self.ratio * self.width, name=f"in_{i}")(nn.LayerNorm(name=f"dense_norm_{i}")(tokens))
        )
        return tokens + nn.Dense(self.width, name=f"out_{i}")(hidden)


class PooledDecoder(nn.Module):
    """A small network on the mean of the features, with a head for every kernel; Flax Linen.

    For small models and tests; what it takes and gives is as with `WeightDecoder`.

    Attributes:
      layout: of the model's kernels.
      hidden: widths of its layers.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> home = sj.methods.hypernetwork
      >>> layout = home.layout_of({"w": jnp.ones((8, 6))}, "w", rank=2)
      >>> decoder = home.PooledDecoder(layout, (16,))
      >>> decoder.init_with_output(jax.random.key(0), jnp.ones((3, 5, 12)))[0].shape
      (3, 28)
    """

    layout: Layout
    hidden: tuple[int, ...] = (128, 128)

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Returns outputs `[n, layout.size]` of features `[n, tokens, width of the encoder]`."""
        x = jnp.mean(features, axis=1)
        for i, width in enumerate(self.hidden):
            x = nn.silu(nn.Dense(width, name=f"hidden_{i}")(x))
        parts = []
        for i, (kernel, sizes) in enumerate(zip(self.layout.kernels, _sizes(self.layout), strict=True)):
            heads = [Head(*sizes, name=f"head_{i}_{j}") for j in range(kernel.layers)]
            parts += [head(x) for head in heads]
        return jnp.concatenate(parts, axis=-1)


def _module_of(path: str) -> str:
    """The name of the module that a kernel is in, which tells what it does: "query", "out"."""
    names = path.split("/")
    return names[-2] if len(names) > 1 else names[-1]
