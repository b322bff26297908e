"""Greedy decoding with a key-value cache, compiled once per shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.banks import per_row
from subspace_jax.core import Params, is_weight, with_adapters

from ._cache import KVCache, init_cache
from ._llama import Llama
from ._llama_config import LlamaConfig


def greedy_decode(
    module: Llama,
    params: Params,
    tokens: Any,
    max_new_tokens: int,
    *,
    mask: Any = None,
    stop_token: int | None = None,
    apply: Callable[..., Any] | None = None,
    rows: Any = None,
) -> jax.Array:
    """Continues each sequence greedily, with the most likely token at every step.

    Args:
        module: the model.
        params: its parameters, or a tree with stand-in weights.
        tokens: `[batch, length]` integer prompt.
        max_new_tokens: number of tokens to add; it is part of the compiled shape.
        mask: `[batch, length]`, true at real tokens; shorter prompts are padded on the left.
        stop_token: id that ends a sequence; the loop ends once all sequences have ended.
        apply: function in place of `module.apply`, which by default understands stand-in weights. Keep one such
          function and reuse it: each new function compiles anew.
        rows: `[batch]` slots of a bank of adapters, which `params` is then: every sequence is continued by its own.

    Returns:
        `[batch, max_new_tokens]` int32; after the stop token the rest repeats it.

    Raises:
        ValueError: an empty or too long prompt, ids outside the vocabulary, padding on the right.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from subspace_jax.models import Llama, greedy_decode, small_llama
        >>> model = Llama(small_llama())
        >>> prompt = jnp.array([[5, 7, 9]])
        >>> params = model.init(jax.random.key(0), prompt)["params"]
        >>> greedy_decode(model, params, prompt, 4).shape
        (1, 4)
    """
    prompt, real = _checked(module.config, tokens, mask, max_new_tokens)
    if rows is not None and apply is not None:
        raise ValueError("greedy_decode: rows= runs the module itself by per_row; leave apply= out.")
    return _decode(
        params,
        prompt,
        real,
        None if rows is None else jnp.asarray(rows),
        apply=_by_row(module)  # pyright: ignore[reportArgumentType]
        if rows is not None
        else module.apply
        if apply is None and not any(map(is_weight, jax.tree.leaves(params, is_leaf=is_weight)))
        else _adapted(module)  # pyright: ignore[reportArgumentType]
        if apply is None
        else apply,
        config=module.config,
        max_new_tokens=max_new_tokens,
        stop_token=stop_token,
    )


@functools.cache
def _adapted(module: Llama) -> Callable[..., Any]:
    """The module on stand-in weights; one function for each module, so that it compiles once."""
    return with_adapters(module.apply)


@functools.cache
def _by_row(module: Llama) -> Callable[..., Any]:
    """The module on a bank of adapters; one function for each module, so that it compiles once."""
    axes = KVCache(keys=1, values=1, valid=0, length=None)  # pyright: ignore[reportArgumentType]
    run = per_row(lambda p, *args: module.apply({"params": p}, *args), in_axes=(0, 0, axes), out_axes=(0, axes))
    return lambda variables, rows, *args: run(variables["params"], rows, *args)


def _checked(config: LlamaConfig, tokens: Any, mask: Any, max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    prompt = np.asarray(tokens)
    if prompt.ndim != 2 or 0 in prompt.shape or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(f"greedy_decode: tokens {prompt.shape} {prompt.dtype}; expected integers (batch, length)")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise ValueError(
            f"greedy_decode: token ids from {prompt.min()} to {prompt.max()}; expected 0 to "
            f"{config.vocab_size - 1}: is this the model's tokenizer?"
        )
    if max_new_tokens < 1 or prompt.shape[1] + max_new_tokens > config.max_positions:
        raise ValueError(
            f"greedy_decode: {prompt.shape[1]} prompt tokens, {max_new_tokens=}; expected at least one new "
            f"token and at most max_positions={config.max_positions} in all"
        )
    real = np.ones(prompt.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if real.shape != prompt.shape or not real[:, -1].all():
        raise ValueError(
            f"greedy_decode: mask {real.shape} for tokens {prompt.shape}; expected the same shape and a real "
            "last token in every row: pad on the left"
        )
    return prompt.astype(np.int32), real


@functools.partial(jax.jit, static_argnames=("apply", "config", "max_new_tokens", "stop_token"))
def _decode(params, prompt, real, rows, *, apply, config, max_new_tokens, stop_token):
    batch, length = prompt.shape
    cache = init_cache(config, batch, length + max_new_tokens)
    stop = -1 if stop_token is None else stop_token

    def next_token(tokens, mask, cache: KVCache):
        named = () if rows is None else (rows,)
        logits, cache = apply({"params": params}, *named, tokens, mask, cache)
        return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32), cache

    def unfinished(carry):
        step, _, _, done, _ = carry
        return (step < max_new_tokens) & ~done.all()

    def extend(carry):
        step, token, cache, done, out = carry
        following, cache = next_token(token[:, None], jnp.ones((batch, 1), bool), cache)
        following = jnp.where(done, stop, following)
        out = jax.lax.dynamic_update_slice(out, following[:, None], (0, step))
        return step + 1, following, cache, done | (following == stop), out

    token, cache = next_token(prompt, real, cache)
    out = jnp.full((batch, max_new_tokens), stop, jnp.int32).at[:, 0].set(token)
    return jax.lax.while_loop(unfinished, extend, (1, token, cache, token == stop, out))[-1]
