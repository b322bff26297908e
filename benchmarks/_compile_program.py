"""Compiles one way to fine-tune a Llama for a mesh of host devices; a program of its own, whose devices are fixed.

Usage: python -m benchmarks._compile_program SETTINGS VARIANTS, where SETTINGS is JSON of `compile_7b.Config` and
variants are joined by commas; each prints a line.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import subspace_jax as sj
from benchmarks._collectives import collectives, product_flops, totals
from benchmarks._layout import held_bytes, of_weights, spec, weight_shapes, with_shardings
from benchmarks._models import cross_entropy
from benchmarks.compile_7b import START
from subspace_jax.models import Llama, LlamaConfig
from subspace_jax.training import TrainState, init_train_state, make_mesh, make_train_step

KERNELS = "decoder/**/kernel"

# Layers whose inputs are split over "data", and those whose inputs are split over "model".
INWARD = "decoder/**/{query,key,value,gate,up}/kernel"
OUTWARD = "decoder/**/{output,down}/kernel"

Rules = Mapping[str, sj.Method]
Make = Callable[[Any], optax.GradientTransformation]


def methods(settings: Mapping[str, Any], roles: Any) -> dict[str, tuple[Rules, Make]]:
    """Returns the rules of every variant that trains, and a function from the frozen tree to the optimizer."""
    rank, (data, model) = settings["rank"], settings["mesh"]
    directions = settings["directions"]

    def adam(_: Any) -> optax.GradientTransformation:
        return optax.adam(1e-4)

    def lift_adam(_: Any) -> optax.GradientTransformation:
        return sj.methods.lift.lift_adam(1e-4)

    def galore(_: Any) -> optax.GradientTransformation:
        return sj.galore(1e-4, directions, decomposition="randomized", roles=roles)

    def dct_adam(_: Any) -> optax.GradientTransformation:
        return sj.dct_adam(1e-4, directions, roles=roles)

    def in_blocks(rows: int, cols: int) -> sj.Method:
        return sj.lift(rank, filter_rank=rank, svd="randomized", blocks=(rows, cols), keep_formed=settings["remat"])

    return {
        "norms": ({"**/scale": sj.full()}, adam),
        "lora": ({KERNELS: sj.lora(rank)}, adam),
        "dora": ({KERNELS: sj.dora(sj.lora(rank))}, adam),
        "pissa": ({KERNELS: sj.pissa(rank)}, adam),
        "lift": ({KERNELS: in_blocks(1, 1)}, lift_adam),
        "lift_blocks": ({INWARD: in_blocks(data, model), OUTWARD: in_blocks(model, data)}, lift_adam),
        "osf": ({KERNELS: sj.osf(0.5)}, lambda frozen: sj.methods.osf.projection(adam(frozen), frozen)),
        "galore": ({KERNELS: sj.full()}, galore),
        "dct": ({KERNELS: sj.full()}, dct_adam),
        "full": ({"**": sj.full()}, adam),
    }


# How the results of layers lie: sequences over "data", heads and hidden units over "model". Without it the compiler
# splits the width of activations rather than gather a layer's matrices, and sends whole activations instead.
ROWS = P("data", None, None)
LAYOUTS = {
    **dict.fromkeys(("query", "key", "value"), P("data", None, "model", None)),
    **dict.fromkeys(("gate", "up", "head"), P("data", None, "model")),
    **dict.fromkeys(("output", "down", "embedding", "attention_norm", "mlp_norm", "norm"), ROWS),
}


# Of rows that are batches of their own: what splits the sequences is said beside the function.
OF_ONE_ROW = {name: P(None, *entries[1:]) for name, entries in LAYOUTS.items()}


def lay_out(layouts: Mapping[str, P]) -> Callable[..., Any]:
    """Returns what names the layout of each layer's result; for `flax.linen.intercept_methods`."""

    def laid_out(function: Callable[..., Any], arguments: Any, options: Any, context: Any) -> Any:
        out = function(*arguments, **options)
        if context.method_name == "__call__" and (found := layouts.get(context.module.name or "")):
            return jax.lax.with_sharding_constraint(out, found)
        return out

    return laid_out


class Setting:
    """The model, its abstract parameters and the batch."""

    def __init__(self, settings: Mapping[str, Any], mesh: Mesh) -> None:
        half = jnp.bfloat16
        self.model = Llama(
            LlamaConfig(
                vocab_size=settings["vocabulary"],
                width=settings["width"],
                num_layers=settings["layers"],
                num_heads=settings["heads"],
                num_kv_heads=settings.get("kv_heads") or settings["heads"],
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

    def apply(self, params: Any, tokens: jax.Array, layouts: Mapping[str, P] = LAYOUTS) -> Any:
        """Logits."""
        with nn.intercept_methods(lay_out(layouts)):
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
        params = self._base()
        lowered = jax.jit(lambda p, t: cross_entropy(self.apply(p, t), jnp.roll(t, -1, axis=1))).lower(
            params, self.tokens
        )
        return lowered, {"frozen_bytes": held_bytes(params), "trainable_bytes": 0, "optimizer_bytes": 0}

    @functools.cached_property
    def roles(self) -> Any:
        """What each array is used for, by one abstract trace."""
        return sj.roles(self.apply, self.params, self.tokens)

    def start(self, rules: Rules, roles: Any) -> tuple[Any, dict[str, Any]]:
        """What makes the adapted tree of the base where it lies, lowered."""

        def start(params: Any) -> Any:
            return sj.adapt(params, rules, key=jax.random.key(1), roles=roles)

        base = self._base()
        adapted = self.placed(jax.eval_shape(start, base))
        lowered = jax.jit(start, out_shardings=jax.tree.map(lambda v: v.sharding, adapted)).lower(base)
        trainable, frozen = sj.partition(adapted)
        sizes = {"frozen_bytes": held_bytes(frozen), "trainable_bytes": held_bytes(trainable), "optimizer_bytes": 0}
        return lowered, sizes

    def bank(self, rules: Rules, roles: Any, adapters: int) -> tuple[Any, dict[str, Any]]:
        """The loss of a batch whose rows use different adapters, lowered."""

        def made(params: Any) -> Any:
            one = sj.adapt(params, rules, key=jax.random.key(1), roles=roles)
            return sj.bank(params, [one] * adapters)

        stacked = self.placed(jax.eval_shape(made, self._base()))
        rows = jax.ShapeDtypeStruct(self.tokens.shape[:1], jnp.int32, sharding=self.tokens.sharding)

        def loss(stacked: Any, rows: jax.Array, tokens: jax.Array) -> jax.Array:
            apply = sj.per_row(lambda params, row: self.apply(params, row, OF_ONE_ROW), spmd_axis_name="data")
            return cross_entropy(apply(stacked, rows, tokens), jnp.roll(tokens, -1, axis=1))

        lowered = jax.jit(loss).lower(stacked, rows, self.tokens)
        return lowered, {"frozen_bytes": held_bytes(stacked), "trainable_bytes": 0, "optimizer_bytes": 0}

    def _base(self) -> Any:
        """The parameters as they are kept, in bfloat16, where they lie."""
        return self.placed(jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, jnp.bfloat16), self.params))

    def step(self, rules: Rules, make: Make, roles: Any) -> tuple[Any, dict[str, Any]]:
        """A training step, lowered."""

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


def _lowered(setting: Setting, settings: Mapping[str, Any], variant: str) -> tuple[Any, dict[str, Any]]:
    """A training step of a method, its start, a batch through a bank of adapters, or the model alone."""
    if variant == "forward":
        return setting.forward()
    roles = setting.roles
    known = methods(settings, roles)
    if variant == "bank":
        return setting.bank(known["lora"][0], roles, settings["adapters"])
    if variant.endswith(START):
        return setting.start(known[variant.removesuffix(START)][0], roles)
    return setting.step(*known[variant], roles)


@functools.cache
def _setting(settings: str) -> Setting:
    """The model of these settings on its mesh, for all variants that a process compiles."""
    known = json.loads(settings)
    data, model = known["mesh"]
    mesh = make_mesh({"data": data, "model": model})
    with jax.set_mesh(mesh):
        return Setting(known, mesh)


def measure(text: str, variant: str) -> dict[str, Any]:
    """Returns what one variant's compiled program holds, computes and sends, by settings in JSON."""
    start = time.perf_counter()
    settings, setting = json.loads(text), _setting(text)
    with jax.set_mesh(setting.mesh):
        lowered, sizes = _lowered(setting, settings, variant)
        traced = time.perf_counter()
        compiled = lowered.compile()
        ended = time.perf_counter()
        shapes = weight_shapes(setting.params)
    program: str = compiled.as_text() or ""
    memory: Any = compiled.memory_analysis()
    found = collectives(program)
    gathers = of_weights(found, shapes)
    return {
        **sizes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": product_flops(program),
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
    for variant in sys.argv[2].split(","):
        print(json.dumps(measure(sys.argv[1], variant)), flush=True)
