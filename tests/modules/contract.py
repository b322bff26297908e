"""Every method that puts modules on activations, which no array stands for: a new one adds one line to `MODULES`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj


@dataclasses.dataclass(frozen=True)
class Case:
    """A method under test, on five blocks of a transformer's MLP.

    Attributes:
      name: name in the test's id.
      factory: makes the method.
      pattern: what of a block it stands on.
    """

    name: str
    factory: Callable[[], sj.Method]
    pattern: str = "**/{fc1,fc2}/kernel"


SMALL = {"atoms": 3, "kept": 2, "width": 5, "head": "**/fc1/kernel"}
MODULES = (
    Case("bottleneck", lambda: sj.bottleneck(3, activation="gelu"), "**/fc2/{kernel,bias}"),
    Case("bottleneck_parallel", lambda: sj.bottleneck(3, placement="parallel", reads="fc1", scale=0.1)),
    Case("mosa", lambda: sj.methods.mosa.mosa(4, parts=2, share="none"), "**/fc2/{kernel,bias}"),
    Case("queryable_lora", lambda: sj.methods.queryable_lora.queryable_lora(4, **SMALL, blocks=("blocks/**",))),
    Case(
        "queryable_lora_wide",
        lambda: sj.methods.queryable_lora.queryable_lora(4, **SMALL, blocks=("blocks/**",), layers_per_block=2),
    ),
    Case("igsp", lambda: sj.methods.igsp.igsp(3, tasks=2, reads="fc1", noise=False)),
    Case("mosa_parallel", lambda: sj.methods.mosa.mosa(4, placement="parallel", reads="fc1", scale=0.1)),
)
LAYERS = 5


def make_params(dtype: Any = jnp.float32) -> Any:
    """Returns the parameters of the blocks, stacked."""
    rng = np.random.default_rng(0)
    shapes = {"fc1": {"kernel": (6, 10), "bias": (10,)}, "fc2": {"kernel": (10, 6), "bias": (6,)}}
    draw = lambda s: jnp.asarray(rng.normal(size=(LAYERS, *s)) / 2, dtype)
    return {"blocks": jax.tree.map(draw, shapes, is_leaf=lambda v: isinstance(v, tuple))}


ROLES = {"**/kernel": sj.Role.dense((1,), (2,), (0,)), "**/bias": sj.Role("bias", (0,))}


def block(p: Any, x: jax.Array) -> jax.Array:
    """A pre-norm block."""
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    hidden = jnp.tanh(normed @ p["fc1"]["kernel"] + p["fc1"]["bias"])
    return x + hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"]


def scanned(p: Any, x: jax.Array) -> jax.Array:
    """The blocks in a loop."""
    return jax.lax.scan(lambda h, layer: (block(layer, h), None), x, p["blocks"])[0]


def rematerialized(p: Any, x: jax.Array) -> jax.Array:
    """The blocks in a loop, each rematerialized."""
    return jax.lax.scan(lambda h, layer: (jax.checkpoint(block)(layer, h), None), x, p["blocks"])[0]


def unrolled(p: Any, x: jax.Array) -> jax.Array:
    """The blocks one after the other."""
    for i in range(LAYERS):
        x = block(jax.tree.map(lambda v, i=i: v[i], p["blocks"]), x)
    return x


def adapt(case: Case, params: Any) -> Any:
    """Returns the tree with the method's stand-ins."""
    return sj.adapt(params, {case.pattern: case.factory()}, key=jax.random.key(0), roles=ROLES)


def moved(adapted: Any, seed: int = 1) -> Any:
    """Returns the tree with everything that learns moved."""
    rng = np.random.default_rng(seed)
    trainable, frozen = sj.partition(adapted)
    trainable = jax.tree.map(np.asarray, trainable)
    return sj.combine(
        jax.tree.map(lambda v: jnp.asarray(v + (0.3 * rng.normal(size=v.shape)).astype(v.dtype)), trainable), frozen
    )
