"""The loss of a causal language model over the tokens that it learns to write."""

from __future__ import annotations

from collections.abc import Callable

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


def chunked_token_loss(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    tokens: jax.Array,
    labels: jax.Array,
    *,
    chunk: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """Returns what `token_loss` returns, with the logits of `chunk` places in memory at a time.

    The backward pass makes each chunk's logits again. Of a vocabulary of 49,152 and 16 rows of 512 tokens all logits
    at once are 1.6 GB, and their derivatives as much.

    Args:
      logits_of: from hidden states `[places, width]` to logits `[places, vocabulary]`; it may use stand-in weights,
        where the whole is called through `with_adapters`.
      hidden: `[batch, length, width]`, the model's last.
      tokens: integer `[batch, length]`.
      labels: bool `[batch, length]`, true at tokens that are learned.
      chunk: places at a time.

    Returns:
      Two float32 scalars: the summed cross-entropy and the number of labels.

    Example:
      >>> import jax.numpy as jnp
      >>> table, hidden, tokens = jnp.ones((4, 2)), jnp.ones((1, 3, 2)), jnp.array([[0, 1, 2]])
      >>> total, count = chunked_token_loss(lambda h: h @ table.T, hidden, tokens, tokens > 0, chunk=1)
      >>> round(float(total), 4), int(count)
      (2.7726, 2)
    """
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets, weights = tokens[:, 1:].reshape(-1), labels[:, 1:].reshape(-1)
    room = -len(targets) % chunk
    states, targets, weights = (
        jnp.pad(array, [(0, room)] + [(0, 0)] * (array.ndim - 1)).reshape(-1, chunk, *array.shape[1:])
        for array in (states, targets, weights)
    )

    @jax.checkpoint
    def one(total: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        state, target, weight = part
        logits = logits_of(state).astype(jnp.float32)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return total + jnp.sum(jnp.where(weight, each, 0.0)), None

    total, _ = jax.lax.scan(one, jnp.zeros(()), (states, targets, weights))
    return total, jnp.sum(weights).astype(jnp.float32)
