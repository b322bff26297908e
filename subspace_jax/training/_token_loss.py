"""The loss of a causal language model over the tokens that it learns to write."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def token_loss(logits: jax.Array, tokens: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Returns the summed cross-entropy of the labeled tokens, and their number.

    The logits of a place predict the next token: \(\ell = -\sum_t m_{t+1} \log p_t(x_{t+1})\), \(n = \sum_t m_{t+1}\).
    Sums, not means: a step that sees several micro-batches, or several devices, divides once by all of its labels.

    Args:
      logits: `[batch, length, vocabulary]`.
      tokens: integer `[batch, length]`.
      labels: bool `[batch, length]`, \(m\), true at tokens that are learned.

    Returns:
      Two float32 scalars.

    Example:
      >>> import jax.numpy as jnp
      >>> total, count = token_loss(jnp.zeros((1, 3, 4)), jnp.array([[0, 1, 2]]), jnp.array([[False, False, True]]))
      >>> round(float(total), 4), int(count)
      (1.3863, 1)
    """
    weights = labels[:, 1:].astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), tokens[:, 1:])
    # where, not a product alone: a padded place may hold anything, an infinity among it.
    return jnp.sum(jnp.where(weights > 0, each, 0.0)), jnp.sum(weights)
