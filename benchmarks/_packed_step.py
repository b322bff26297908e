"""One LoRA step on a language model, packed or in float32, in a process of its own: prints what it held.

python -m benchmarks._packed_step FILE ARM STEPS TOKENS RANK CHUNK CACHE
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import subspace_jax as sj
from subspace_jax.models import load_gguf
from subspace_jax.training import chunked_token_loss


def peak_bytes() -> int:
    """Returns the largest resident memory of this process so far.

    That of the system's status file where there is one: `ru_maxrss` begins with what the starting process held.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(file: str, arm: str, steps: int, length: int, rank: int, chunk: int, cache: str) -> None:
    """Loads, trains some steps, and prints one line of JSON."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.devices()
    imports = peak_bytes()
    model = load_gguf(file, packed=arm == "packed", scan_layers=True, remat=True)
    loaded = peak_bytes()

    def losses(params: Any, tokens: jax.Array) -> jax.Array:
        hidden: Any = model.module.apply({"params": params}, tokens, return_hidden=True)
        table = params["embedding"]["embedding"] if model.config.tie_embeddings else params["head"]["kernel"].T
        # By axes, not transposed: a compiler may copy a transposed table out of the loop over chunks.
        logits = lambda h: jnp.einsum("pw,vw->pv", h, table.astype(h.dtype))  # noqa: E731
        total, count = chunked_token_loss(logits, hidden, tokens, tokens >= 0, chunk=chunk)
        return total / count

    tokens = jax.random.randint(jax.random.key(0), (1, length), 0, model.config.vocab_size)
    found = sj.roles(losses, model.params, tokens)
    adapted = sj.adapt(model.params, {"decoder/**/kernel": sj.lora(rank)}, key=jax.random.key(1), roles=found)
    trainable, frozen = sj.partition(adapted)
    optimizer = optax.adam(1e-3)
    state = optimizer.init(trainable)
    loss = sj.with_adapters(losses)

    def step(trainable, state, frozen, tokens):
        value, gradient = jax.value_and_grad(lambda t: loss(sj.combine(t, frozen), tokens))(trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    del adapted
    run = jax.jit(step, donate_argnums=(0, 1))
    values, seconds = [], []
    for _ in range(steps):
        began = time.perf_counter()
        trainable, state, value = run(trainable, state, frozen, tokens)
        values.append(float(value))
        seconds.append(time.perf_counter() - began)
    result = {
        "imports_bytes": imports,
        "loaded_bytes": loaded - imports,
        "peak_bytes": peak_bytes() - imports,
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "values": sum(leaf.size for _, leaf in sj.core.leaves_with_paths(model.params)),
        "losses": values,
        "first_seconds": seconds[0],
        "step_seconds": min(seconds[1:], default=seconds[0]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[3:7]]
    main(sys.argv[1], sys.argv[2], numbers[0], numbers[1], numbers[2], numbers[3], sys.argv[7])
