"""`adapt` as it is called, kernel by kernel and without jit, on an encoder of drawn weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import subspace_jax as sj
from benchmarks._compilations import compilations
from benchmarks._starts import LEARNING_RATE, covariance
from subspace_jax.core import Statistics, leaves_with_paths, select_paths
from subspace_jax.models import Bert, BertConfig

KERNELS = "encoder/**/kernel"


def start_encoder(layers: int, width: int, console: Console) -> list[dict[str, Any]]:
    """Adapts all kernels of an encoder twice with every method, in one process.

    Args:
      layers: of the encoder.
      width: of it; the MLP is four times as wide.
      console: hears of every method.

    Returns:
      For each method the seconds and the number of compilations of both calls.
    """
    sizes = BertConfig(vocab_size=64, width=width, num_layers=layers, num_heads=4, mlp_width=4 * width)
    model, tokens = Bert(sizes), jnp.zeros((1, 4), jnp.int32)

    def apply(params: Any, tokens: jax.Array) -> Any:
        return model.apply({"params": params}, tokens, jnp.ones(tokens.shape, bool))

    params = jax.jit(lambda key: model.init(key, tokens, jnp.ones(tokens.shape, bool))["params"])(jax.random.key(0))
    roles = sj.roles(apply, params, tokens)
    paths = select_paths(params, KERNELS)
    given = {path: _drawn(roles[path], leaf.shape) for path, leaf in leaves_with_paths(params) if path in paths}
    rank, small = width // 6, 4
    methods: dict[str, Callable[[], sj.Method]] = {
        "lora": lambda: sj.lora(small),
        "pissa": lambda: sj.pissa(small),
        "corda": lambda: sj.corda(small),
        "lora_sb": lambda: sj.lora_sb(rank, learning_rate=LEARNING_RATE),
        "lora_xs": lambda: sj.methods.lora_sb.lora_xs(rank),
        "svfit, full SVD": lambda: sj.svfit(width),
    }
    rows = []
    for name, make in methods.items():
        seconds, counts = [], []
        for _ in range(2):
            with compilations() as compiled:
                begun = time.perf_counter()
                made = sj.adapt(params, {KERNELS: make()}, key=jax.random.key(0), roles=roles, stats=given)
                jax.block_until_ready(made)
                seconds.append(time.perf_counter() - begun)
            counts.append(len(compiled))
        rows.append({"method": name, "kernels": len(given), "seconds": seconds, "compilations": counts})
        console.print(f"  {name} on {len(given)} kernels: {seconds[0]:.1f} s, again {seconds[1]:.1f} s")
    return rows


def _drawn(role: sj.Role, shape: tuple[int, ...]) -> Statistics:
    size, _ = role.sizes(shape)
    rng = np.random.default_rng(size)
    gram, gradient = covariance(rng, size), rng.standard_normal(shape, np.float32)
    return Statistics(gram=jnp.asarray(gram), gradient=jnp.asarray(gradient))
