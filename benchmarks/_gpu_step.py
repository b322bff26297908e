"""Training steps of a Llama in bfloat16, method by method, in a process of its own: prints a row of JSON for each.

python -m benchmarks._gpu_step TASK
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import subspace_jax as sj
from benchmarks._gpu_rows import (
    BLOCK_SIZE,
    FLASH,
    JOINED,
    LEARNING_RATE,
    PLUS,
    SHAPES,
    AbsentError,
    Task,
    print_rows,
    timed,
    timing,
)
from benchmarks._products import product_flops
from subspace_jax.models import Llama, LlamaConfig

KERNELS = "decoder/**/kernel"

# XLA joins products that share an operand, as queries, keys and values with their factors do, where operands and result
# of one of them are below a size: 32 MiB by default, which the activations of a large batch exceed.
JOIN_BELOW = {"xla_gpu_dot_merger_threshold_mb": 1024}

# Sizes and approximations as PEFT has them, so that both do the same; None trains everything.
METHODS: Mapping[str, Callable[[int], sj.Method] | None] = {
    "full": None,
    "lora": sj.lora,
    "dora": lambda rank: sj.dora(sj.lora(rank)),
    "pissa": sj.pissa,
    "randlora": lambda rank: sj.randlora(rank, scaling="peft"),
    "oft": lambda _: sj.oft(BLOCK_SIZE, terms=5),
    "project_orthogonal": None,
    "galore": None,
}


class Model:
    """A Llama with random weights, and a batch of random tokens."""

    def __init__(self, name: str):
        shape = SHAPES[name]
        self.config = LlamaConfig(
            vocab_size=shape.vocabulary,
            width=shape.width,
            num_layers=shape.layers,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            mlp_width=shape.mlp_width,
            scan_layers=shape.layers > 4,
            remat=shape.remat,
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
        )
        self.tokens = jax.random.randint(jax.random.key(2), (shape.batch, shape.length), 0, shape.vocabulary)
        model = Llama(self.config)
        self.params = jax.jit(lambda: model.init(jax.random.key(0), self.tokens)["params"])()
        self.roles = sj.roles(self.forward(), self.params, self.tokens)

    def forward(self, **options: Any) -> Callable[[Any, jax.Array], Any]:
        """Returns the function of parameters and tokens, with some options of the configuration."""
        module = Llama(dataclasses.replace(self.config, **options))
        return lambda params, tokens: module.apply({"params": params}, tokens)

    def optimizer(self, variant: str) -> optax.GradientTransformationExtraArgs:
        """Returns AdamW, or what a variant has around it or instead of it."""
        adamw = optax.adamw(LEARNING_RATE)
        if variant == "galore":
            rank = min(128, self.config.width // 4)
            return sj.galore(LEARNING_RATE, rank, roles=self.roles, decomposition="randomized")
        if variant != "project_orthogonal":
            return optax.with_extra_args_support(adamw)
        kernels = {path: v for path, v in sj.core.leaves_with_paths(self.params) if "/mlp/" in path}
        return optax.chain(sj.project_orthogonal(_half_bases(kernels), roles=self.roles), adamw)


@jax.jit
def _half_bases(kernels: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Orthonormal columns for half of the shorter side of every kernel, which are what a projection removes."""
    halves = {path: kernel[..., : min(kernel.shape[-2:]) // 2] for path, kernel in kernels.items()}
    return {path: jnp.linalg.qr(half.astype(jnp.float32))[0] for path, half in halves.items()}


def measure(made: Callable[[], Model], variant: str, task: Task) -> dict[str, Any]:
    """Compiles and times one variant's step."""
    kind, *options = variant.split(PLUS)
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and task.shape != "tiny":
        raise AbsentError(f"JAX's device is a {jax.default_backend()}")
    if not on_gpu and FLASH in options:
        raise AbsentError("its attention needs a GPU")
    if not on_gpu and JOINED in options:
        raise AbsentError("only the compiler for GPUs joins products")
    model = made()
    forward = model.forward(attention="cudnn") if FLASH in options else model.forward()
    method = METHODS[kind]
    trainable, frozen = model.params, None
    if method is not None:
        forward = sj.with_adapters(forward)
        adapted = sj.adapt(model.params, {KERNELS: method(task.rank)}, key=jax.random.key(1), roles=model.roles)
        trainable, frozen = sj.partition(adapted)
        del adapted
    trainable = jax.tree.map(jnp.copy, trainable)  # what is donated may be the base, which others start from
    optimizer = model.optimizer(kind)

    def step(trainable: Any, state: Any, frozen: Any, tokens: jax.Array):
        def loss(trainable: Any) -> jax.Array:
            params = trainable if frozen is None else sj.combine(trainable, frozen)
            logits = forward(params, tokens)[:, :-1].astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state = jax.jit(optimizer.init)(trainable)
    start = time.perf_counter()
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(trainable, state, frozen, model.tokens)
    compiled = traced.lower().compile(JOIN_BELOW if JOINED in options else None)
    build = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    values = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    held: list[Any] = [trainable, state]
    del trainable, state
    losses: list[jax.Array] = []

    def once() -> None:
        held[0], held[1], value = compiled(held[0], held[1], frozen, model.tokens)
        losses.append(value)

    times = timed(once, lambda: losses[-1].block_until_ready(), task.seconds)
    argument, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return {
        **timing(times, model.tokens.size),
        "build_s": build,
        "bytes": argument + temporary + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary_bytes": temporary,
        "flops": product_flops(traced.jaxpr),
        "trainable_values": values,
        "losses": [float(losses[0]), float(losses[-1])],
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
    }


def main(text: str) -> None:
    """Measures a task."""
    task = Task.read(text)
    model = functools.cache(lambda: Model(task.shape))  # the first variant makes it: where it fails, that is a row
    print_rows(task, lambda variant: measure(model, variant, task))


if __name__ == "__main__":
    main(sys.argv[1])
