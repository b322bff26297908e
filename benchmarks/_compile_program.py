"""Compiles one way to fine-tune a Llama for a mesh of host devices; a program of its own, whose devices are fixed.

Usage: python -m benchmarks._compile_program SETTINGS VARIANT, where SETTINGS is JSON of `compile_7b.Config`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import subspace_jax as sj
from benchmarks._collectives import Operation, collectives, product_flops, totals
from benchmarks._models import cross_entropy
from subspace_jax.core import leaves_with_paths, matches
from subspace_jax.models import Llama, LlamaConfig
from subspace_jax.training import TrainState, init_train_state, make_mesh, make_train_step

KERNELS = "decoder/**/kernel"

# Each frozen matrix is split over both axes of the mesh: fully sharded over "data", by heads and hidden units over
# "model".
SPECS = {
    "embedding/embedding": P("model", "data"),
    "**/attention/output/kernel": P(None, "model", None, "data"),
    "**/attention/*/kernel": P(None, "data", "model", None),
    "**/mlp/down/kernel": P(None, "model", "data"),
    "**/mlp/*/kernel": P(None, "data", "model"),
    "head/kernel": P("data", "model"),
    "**": P(),
}


# Layers whose inputs are split over "data", and those whose inputs are split over "model".
INWARD = "decoder/**/{query,key,value,gate,up}/kernel"
OUTWARD = "decoder/**/{output,down}/kernel"

Make = Callable[[Any], optax.GradientTransformation]


def methods(settings: dict[str, Any]) -> dict[str, tuple[dict[str, sj.Method], Make]]:
    """Returns the rules of every variant that trains, and a function from the frozen tree to the optimizer."""
    rank, (data, model) = settings["rank"], settings["mesh"]

    def adam(_: Any) -> optax.GradientTransformation:
        return optax.adam(1e-4)

    def lift_adam(_: Any) -> optax.GradientTransformation:
        return sj.methods.lift.lift_adam(1e-4)

    def in_blocks(rows: int, cols: int) -> sj.Method:
        return sj.lift(rank, filter_rank=rank, svd="randomized", blocks=(rows, cols), keep_formed=settings["remat"])

    return {
        "norms": ({"**/scale": sj.full()}, adam),
        "lora": ({KERNELS: sj.lora(rank)}, adam),
        "pissa": ({KERNELS: sj.pissa(rank)}, adam),
        "lift": ({KERNELS: in_blocks(1, 1)}, lift_adam),
        "lift_blocks": ({INWARD: in_blocks(data, model), OUTWARD: in_blocks(model, data)}, lift_adam),
        "osf": ({KERNELS: sj.osf(0.5)}, lambda frozen: sj.methods.osf.projection(adam(frozen), frozen)),
        "full": ({"**": sj.full()}, adam),
    }


def spec(path: str) -> P:
    """Returns how the array at a path is split."""
    return next(found for pattern, found in SPECS.items() if matches(pattern, path))


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Returns shapes that say where their arrays lie."""
    return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), tree, shardings)


def held_bytes(tree: Any) -> int:
    """Returns the bytes of a tree on one device."""
    return sum(math.prod(v.sharding.shard_shape(v.shape)) * v.dtype.itemsize for v in jax.tree.leaves(tree))


def weight_shapes(params: Any) -> set[tuple[int, ...]]:
    """Returns the shapes that a gathered matrix of the base can have on a device: split over one axis, or whole.

    Sorted sizes above one, since the compiler transposes and joins axes.
    """
    found = set()
    for path, leaf in leaves_with_paths(params):
        if not path.endswith(("kernel", "embedding")):
            continue
        sizes = [(n, entry) for n, entry in zip(leaf.shape, spec(path), strict=True) if entry is not None or n > 1]
        if "layers" in path:
            sizes = sizes[1:]
        split = [i for i, (_, entry) in enumerate(sizes) if entry]
        mesh = jax.sharding.get_mesh().shape
        for count in range(len(split)):
            for kept in itertools.combinations(split, count):
                dims = [n // mesh[entry] if i in kept else n for i, (n, entry) in enumerate(sizes)]
                joined = [dims] if len(dims) == 2 else [dims, _join(sizes, dims)]
                found |= {tuple(sorted(n for n in one if n > 1)) for one in joined}
    return found


def _join(sizes: Sequence[tuple[int, Any]], dims: Sequence[int]) -> list[int]:
    """Heads and their size as one axis."""
    heads = 1 if sizes[-1][1] is None else 0
    return [*dims[:heads], dims[heads] * dims[heads + 1], *dims[heads + 2 :]]


def of_weights(found: Iterable[tuple[Operation, int]], shapes: set[tuple[int, ...]]) -> list[tuple[Operation, int]]:
    """Returns those results of collectives that are a matrix of the base, or more of one than a device holds."""
    kept = []
    for operation, times in found:
        results = tuple(one for one in operation.shapes if tuple(sorted(n for n in one[1] if n > 1)) in shapes)
        if results:
            kept.append((dataclasses.replace(operation, shapes=results), times))
    return kept


# How the results of layers lie: sequences over "data", heads and hidden units over "model". Without it the compiler
# splits the width of activations rather than gather a layer's matrices, and sends whole activations instead.
ROWS = P("data", None, None)
LAYOUTS = {
    **dict.fromkeys(("query", "key", "value"), P("data", None, "model", None)),
    **dict.fromkeys(("gate", "up", "head"), P("data", None, "model")),
    **dict.fromkeys(("output", "down", "embedding", "attention_norm", "mlp_norm", "norm"), ROWS),
}


def lay_out(function: Callable[..., Any], arguments: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
    """Names the layout of what a layer of the model returns; for `flax.linen.intercept_methods`."""
    out = function(*arguments, **options)
    if context.method_name == "__call__" and (found := LAYOUTS.get(context.module.name or "")):
        return jax.lax.with_sharding_constraint(out, found)
    return out


class Setting:
    """The model, its abstract parameters and the batch."""

    def __init__(self, settings: dict[str, Any], mesh: Mesh) -> None:
        half = jnp.bfloat16
        self.model = Llama(
            LlamaConfig(
                vocab_size=settings["vocabulary"],
                width=settings["width"],
                num_layers=settings["layers"],
                num_heads=settings["heads"],
                num_kv_heads=settings["heads"],
                mlp_width=settings["mlp_width"],
                max_positions=settings["length"],
                tie_embeddings=False,
                scan_layers=True,
                remat=settings["remat"],
                dtype=half,
            )
        )
        self.mesh = mesh
        tokens = jax.ShapeDtypeStruct((settings["sequences"], settings["length"]), jnp.int32)
        self.params = jax.eval_shape(lambda key: self.model.init(key, tokens)["params"], jax.random.key(0))
        self.tokens = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=NamedSharding(mesh, P("data")))
        self.specs = jax.tree_util.tree_map_with_path(
            lambda path, _: spec(jax.tree_util.keystr(path, simple=True, separator="/")), self.params
        )

    def apply(self, params: Any, tokens: jax.Array) -> Any:
        """Logits."""
        with nn.intercept_methods(lay_out):
            return self.model.apply({"params": params}, tokens)

    def loss(self, adapted: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
        """Cross-entropy of the next token; the last one's is of the first, so that shapes stay even."""
        del key
        return cross_entropy(sj.with_adapters(self.apply)(adapted, tokens), jnp.roll(tokens, -1, axis=1))

    def placed(self, tree: Any) -> Any:
        """Shapes with the shardings that follow from the base's."""
        return with_shardings(tree, sj.shardings(tree, self.specs, self.mesh))

    def forward(self) -> tuple[Any, dict[str, Any]]:
        """The loss of the model alone, lowered."""
        half = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, jnp.bfloat16), self.params)
        params = self.placed(half)
        lowered = jax.jit(lambda p, t: cross_entropy(self.apply(p, t), jnp.roll(t, -1, axis=1))).lower(
            params, self.tokens
        )
        return lowered, {"frozen_bytes": held_bytes(params), "trainable_bytes": 0, "optimizer_bytes": 0}

    def step(self, rules: dict[str, sj.Method], make: Make) -> tuple[Any, dict[str, Any]]:
        """A training step, lowered."""
        roles = sj.roles(self.apply, self.params, self.tokens)

        def start(params: Any) -> TrainState:
            adapted = sj.adapt(params, rules, key=jax.random.key(1), roles=roles)
            optimizer = make(sj.partition(adapted)[1])
            return init_train_state(adapted, optimizer, jax.random.key(2), compute_dtype=jnp.bfloat16)

        state = jax.eval_shape(start, self.params)
        everywhere = NamedSharding(self.mesh, P())
        trainable, frozen = self.placed(state.trainable), self.placed(state.frozen)
        # The state may hold what the optimizer was made of.
        both = optax.GradientTransformation(lambda trees: make(trees[1]).init(trees[0]), optax.identity().update)
        shardings = jax.tree.map(lambda v: v.sharding, (trainable, frozen))
        opt_state = with_shardings(state.opt_state, sj.state_shardings(both, (trainable, frozen), shardings))
        step, key = (with_shardings(v, everywhere) for v in (state.step, state.key))
        lowered = make_train_step(self.loss, make(frozen)).lower(
            TrainState(step, trainable, frozen, opt_state, key), self.tokens
        )
        return lowered, {
            "trainable_values": sum(v.size for v in jax.tree.leaves(trainable)),
            "frozen_bytes": held_bytes(frozen),
            "trainable_bytes": held_bytes(trainable),
            "optimizer_bytes": held_bytes(opt_state),
        }


def measure(settings: dict[str, Any], variant: str) -> dict[str, Any]:
    """Returns what one variant's compiled program holds, computes and sends."""
    data, model = settings["mesh"]
    mesh = make_mesh({"data": data, "model": model})
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        setting = Setting(settings, mesh)
        lowered, sizes = setting.forward() if variant == "forward" else setting.step(*methods(settings)[variant])
        traced = time.perf_counter()
        compiled = lowered.compile()
        ended = time.perf_counter()
        shapes = weight_shapes(setting.params)
    text: str = compiled.as_text() or ""
    memory: Any = compiled.memory_analysis()
    found = collectives(text)
    gathers = of_weights(found, shapes)
    return {
        **sizes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": product_flops(text),
        "collectives": totals(found),
        "of_weights": totals(gathers),
        "largest": [
            [operation.kind, times, [f"{dtype}{list(dims)}" for dtype, dims in operation.shapes]]
            for operation, times in sorted(found, key=lambda pair: -pair[1] * pair[0].bytes)[:12]
        ],
        "lower_seconds": traced - start,
        "compile_seconds": ended - traced,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]), sys.argv[2])))
