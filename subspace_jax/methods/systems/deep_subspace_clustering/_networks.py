"""Autoencoders whose layers are expressed: dense ones, and the convolutional ones of the benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from subspace_jax.core import check_int


class Network(NamedTuple):
    """An autoencoder as functions; bring your own, or take one of those below.

    Attributes:
      init: `init(key, x)`, parameters as `{"encoder": ..., "decoder": ...}`.
      encode: `encode(encoder, x)`, the outputs of all layers in order, each `[samples, ...]`; the last is decoded.
      decode: `decode(decoder, z, x)`, what `x` is rebuilt as; of `x` only the shape is read.
    """

    init: Callable[[jax.Array, jax.Array], Any]
    encode: Callable[[Any, jax.Array], tuple[jax.Array, ...]]
    decode: Callable[[Any, jax.Array, jax.Array], jax.Array]


class _Dense(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        found = []
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f"layer_{i}")(x)
            x = nn.relu(x) if i + 1 < len(self.widths) else x
            found.append(x)
        return tuple(found)


class _Conv(nn.Module):
    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    transpose: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        found = []
        kind = nn.ConvTranspose if self.transpose else nn.Conv
        for i, (width, kernel) in enumerate(zip(self.channels, self.kernels, strict=True)):
            x = kind(width, (kernel, kernel), strides=(2, 2), padding="SAME", name=f"layer_{i}")(x)
            x = x if self.transpose and i + 1 == len(self.channels) else nn.relu(x)
            found.append(x)
        return tuple(found)


@functools.cache
def _dense_network(widths: tuple[int, ...]) -> Network:
    encoder = _Dense(widths)

    def decoder(x: jax.Array) -> _Dense:
        return _Dense((*widths[-2::-1], x.shape[-1]))

    return _network(encoder, decoder)


def dense_network(widths: Sequence[int]) -> Network:
    """Returns a dense autoencoder with ReLU between its layers; the decoder mirrors the encoder.

    Args:
      widths: of the encoder's layers, such as (64, 48, 24).

    Returns:
      Functions; the same widths give the same ones, so that nothing is compiled twice.

    Raises:
      RankError: a width is no positive integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net, x = dense_network((8, 3)), jnp.ones((5, 10))
      >>> [z.shape for z in net.encode(net.init(jax.random.key(0), x)["encoder"], x)]
      [(5, 8), (5, 3)]
    """
    return _dense_network(tuple(check_int("dense_network: widths", w) for w in widths))


@functools.cache
def _conv_network(channels: tuple[int, ...], kernels: tuple[int, ...]) -> Network:
    def decoder(x: jax.Array) -> _Conv:
        return _Conv((*channels[-2::-1], x.shape[-1]), kernels[::-1], transpose=True)

    return _network(_Conv(channels, kernels), decoder)


def conv_network(channels: Sequence[int], kernels: Sequence[int] | int = 3) -> Network:
    """Returns a convolutional autoencoder: stride 2, padding "same", ReLU; the decoder mirrors the encoder.

    The benchmarks' networks have channels 3, 3, 5 (ORL), 15 (COIL20), 50 with kernel 5 (COIL100) and 10, 20, 30 with
    kernels 5, 3, 3 (Extended YaleB).

    Args:
      channels: of the encoder's layers.
      kernels: side of each kernel, or one for all.

    Returns:
      Functions of images `[samples, height, width, channels]`.

    Raises:
      RankError: a number is no positive integer.
      ValueError: there are more kernels than layers, or fewer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net, x = conv_network((4, 6)), jnp.ones((2, 9, 8, 1))
      >>> [z.shape for z in net.encode(net.init(jax.random.key(0), x)["encoder"], x)]
      [(2, 5, 4, 4), (2, 3, 2, 6)]
    """
    found = tuple(check_int("conv_network: channels", c) for c in channels)
    sides = (kernels,) * len(found) if isinstance(kernels, int) else kernels
    sides = tuple(check_int("conv_network: kernels", k) for k in sides)
    if len(sides) != len(found):
        raise ValueError(f"conv_network: {len(sides)} kernels for {len(found)} layers; expected one for each.")
    return _conv_network(found, sides)


def _network(encoder: nn.Module, decoder: Callable[[jax.Array], nn.Module]) -> Network:
    def init(key: jax.Array, x: jax.Array) -> Any:
        first, second = jax.random.split(key)
        layers, variables = encoder.init_with_output(first, x)
        last: Any = layers
        return {
            "encoder": variables.get("params", {}),
            "decoder": decoder(x).init(second, last[-1] if last else x).get("params", {}),
        }

    def encode(params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
        found: Any = encoder.apply({"params": params}, x)
        return found

    def decode(params: Any, z: jax.Array, x: jax.Array) -> jax.Array:
        found: Any = decoder(x).apply({"params": params}, z)
        rebuilt = found[-1]
        # A stride of two rounds odd sides up on the way back.
        return rebuilt[tuple(slice(0, n) for n in x.shape)] if rebuilt.ndim > 2 else rebuilt

    return Network(jax.jit(init), encode, decode)


def expressed_layers(network: Network, encoder: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the input and the outputs of all layers, flattened: what one matrix expresses.

    Args:
      network: an autoencoder.
      encoder: parameters of its encoder.
      x: `[samples, ...]`.

    Returns:
      Arrays `[samples, features of the layer]`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net, x = dense_network((3,)), jnp.ones((5, 10))
      >>> [z.shape for z in expressed_layers(net, net.init(jax.random.key(0), x)["encoder"], x)]
      [(5, 10), (5, 3)]
    """
    return tuple(jnp.reshape(z, (x.shape[0], -1)) for z in (x, *network.encode(encoder, x)))
