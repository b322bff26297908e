"""The mathematics of the router: attention over earlier blocks, logits over atoms, and the choice of a few."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Router(NamedTuple):
    """The parameters of the router, which all blocks share.

    Attributes:
      keys: of the atoms, `[atoms, width]`.
      query: \\(W_q\\), `[rank, width]`.
      summary: \\(W_s\\), `[rank, width]`.
      depth: \\(W_d\\), `[rank, width]`.
      blocks: \\(e\\), `[blocks, width]`.
      log_prior: `[..., atoms]`, times its strength; zero without an instruction.
      temperature: \\(\\tau\\), a scalar.
    """

    keys: jax.Array
    query: jax.Array
    summary: jax.Array
    depth: jax.Array
    blocks: jax.Array
    log_prior: jax.Array
    temperature: jax.Array


def layer_norm(u: jax.Array) -> jax.Array:
    """Returns rows of mean 0 and variance 1, without a gain, with eps 1e-6.

    Example:
      >>> import jax.numpy as jnp
      >>> layer_norm(jnp.array([1.0, 2.0, 3.0])).round(3).tolist()
      [-1.225000023841858, 0.0, 1.225000023841858]
    """
    centered = u - jnp.mean(u, axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + 1e-6)


def route(normed: jax.Array, history: jax.Array, block: jax.Array, router: Router, kept: int) -> jax.Array:
    r"""Returns the weights of the atoms, \(\alpha\): none negative, of sum 1, at most `kept` not zero.

    \(a_j = \mathrm{softmax}_{j < b}(q_0 \cdot c_j W_d / \sqrt{d_k})\) with \(q_0 = \mathrm{LN}(u) W_q\);
    \(s = \sum_j a_j c_j\), 0 in the first block; \(z_i = (q_0 + s W_s + e_b) \cdot k_i / (\sqrt{d_k}\,\tau)\) plus the
    prior; then the largest `kept` logits, exactly so many, and their softmax.

    Args:
      normed: \(\mathrm{LN}(u)\) of this block, `[..., rank]`, float32.
      history: \(c_j\), those of earlier blocks, `[blocks, ..., rank]`; what is not earlier is not looked at.
      block: \(b\), counted from 0, an int32 scalar.
      router: what all blocks share.
      kept: atoms that are used.

    Returns:
      `[..., atoms]`, float32.
    """
    scale = jnp.sqrt(jnp.asarray(router.keys.shape[-1], jnp.float32))
    query = normed @ router.query
    scores = jnp.einsum("...k,b...k->b...", query, history @ router.depth) / scale
    earlier = (jnp.arange(history.shape[0]) < block).reshape(-1, *(1,) * (scores.ndim - 1))
    # In the first block nothing is earlier: the softmax is over equal scores, and all of it is set to zero.
    attention = jnp.where(earlier, jax.nn.softmax(jnp.where(earlier, scores, _LOW), axis=0), 0.0)
    summary = jnp.einsum("b...,b...r->...r", attention, history)
    query = query + summary @ router.summary + router.blocks[block]
    logits = query @ router.keys.T / (scale * router.temperature) + router.log_prior
    return sparse_softmax(logits, kept)


def sparse_softmax(logits: jax.Array, kept: int) -> jax.Array:
    """Returns the softmax over the largest `kept` logits, exactly so many, and 0 elsewhere.

    Example:
      >>> import jax.numpy as jnp
      >>> sparse_softmax(jnp.array([0.0, 0.0, 0.0, -1.0]), 2).tolist()
      [0.5, 0.5, 0.0, 0.0]
    """
    if kept >= logits.shape[-1]:
        return jax.nn.softmax(logits, axis=-1)
    _, places = jax.lax.top_k(jax.lax.stop_gradient(logits), kept)
    chosen = jnp.any(jax.nn.one_hot(places, logits.shape[-1], dtype=bool), axis=-2)
    return jnp.where(chosen, jax.nn.softmax(jnp.where(chosen, logits, _LOW), axis=-1), 0.0)


def log_prior(instruction: jax.Array, projection: jax.Array, descriptors: jax.Array, ndim: int) -> jax.Array:
    r"""Returns \(\log \pi = \mathrm{log\,softmax}_i((t W_t) \cdot T_i / \sqrt{d_k})\), for rows of `ndim` axes.

    Args:
      instruction: \(t\), `[text]`, or `[batch, text]` for one of each example.
      projection: \(W_t\), `[text, width]`.
      descriptors: \(T\), `[atoms, width]`.
      ndim: axes of the activations, of which the first is that of examples.

    Returns:
      `[atoms]`, or `[batch, 1, ..., atoms]`.
    """
    scores = (instruction @ projection) @ descriptors.T / jnp.sqrt(jnp.asarray(projection.shape[-1], jnp.float32))
    logs = jax.nn.log_softmax(scores, axis=-1)
    return logs if logs.ndim == 1 else logs.reshape(logs.shape[0], *(1,) * (ndim - 2), logs.shape[-1])


# Half of the smallest float, so that a difference of two is still one.
_LOW = float(jnp.finfo(jnp.float32).min) / 2
