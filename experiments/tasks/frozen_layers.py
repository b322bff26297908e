"""A pretrained tower cut in two: lower layers that run once for all examples, and upper layers that learn."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def cut(module: Any, params: Any, learning: int) -> tuple[Any, Any, Any]:
    """Cuts a `Bert` or a `Vit` below its last layers.

    Args:
      module: of at least `learning` layers, not scanned.
      params: its parameters.
      learning: number of layers above the cut.

    Returns:
      The module of the lower layers, which uses the same parameters; the module of the upper ones; and the parameters
      of that, without embeddings: call it by `run_upper`.
    """
    config = module.config
    frozen = config.num_layers - learning
    encoder = {f"layer_{i}": params["encoder"][f"layer_{frozen + i}"] for i in range(learning)}
    others = {name: tree for name, tree in params.items() if name not in ("embeddings", "encoder")}
    bare: dict[str, Any] = {"final_norm": False} if hasattr(config, "final_norm") else {}
    lower = module.clone(config=dataclasses.replace(config, num_layers=frozen, **bare))
    upper = module.clone(config=dataclasses.replace(config, num_layers=learning))
    return lower, upper, {"encoder": encoder, **others}


def run_lower(module: Any, params: Any, *inputs: np.ndarray, size: int = 50) -> np.ndarray:
    """Returns what the upper layers see of all examples, `[examples, length, width]`, in batches of `size`."""
    total = len(inputs[0])
    padded = [np.concatenate([x, np.repeat(x[:1], -total % size, axis=0)]) for x in inputs]
    found = [np.asarray(_compiled(module)(params, *(x[i : i + size] for x in padded))) for i in range(0, total, size)]
    return np.concatenate(found)[:total]


@functools.cache
def _compiled(module: Any) -> Any:
    """One program for all splits."""
    return jax.jit(lambda params, *batch: module.apply({"params": params}, *batch))


def run_upper(module: Any, params: Any, hidden: jax.Array, *inputs: jax.Array) -> jax.Array:
    """Returns the output of the upper layers.

    Args:
      module: of the upper layers.
      params: its parameters.
      hidden: what the lower ones gave; it takes the place of the embeddings.
      *inputs: what the module is called with; only shapes and masks count.
    """

    def instead(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        return jnp.asarray(hidden) if context.module.name == "embeddings" else call(*args, **kwargs)

    with nn.intercept_methods(instead):
        return module.apply({"params": params}, *inputs)
