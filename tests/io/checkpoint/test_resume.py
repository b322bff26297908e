"""A run that is killed at any moment and started again ends in the same bits as one that never was."""

import itertools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.io import Checkpointer

STEPS = 24


def train(folder, light):
    """Trains a small model with dropout and a noisy schedule; whatever changes the bits is in the checkpoint."""
    drawn = np.random.default_rng(0).normal
    params = {"in": jnp.asarray(drawn(size=(8, 16)), jnp.bfloat16), "out": jnp.asarray(drawn(size=(16, 4)) / 4)}
    data = drawn(size=(64, 8)).astype(np.float32)
    rules = {"in": sj.lora(rank=2, dropout=0.3), "out": sj.pissa(rank=2)}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.MultiSteps(optax.adamw(optax.cosine_decay_schedule(0.05, 20)), 2).gradient_transformation(),
    )
    apply = sj.with_adapters(lambda p, x: jnp.tanh(x.astype(jnp.bfloat16) @ p["in"]).astype(jnp.float32) @ p["out"])

    @jax.jit
    def step(trainable, frozen, state, key, batch):
        key, noise = jax.random.split(key)

        def loss(trainable):
            tree = sj.with_dropout(sj.combine(trainable, frozen), noise)
            return jnp.mean((apply(tree, batch) - batch[:, :4] ** 2) ** 2)

        updates, state = optimizer.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state, key

    with Checkpointer(folder, max_to_keep=2, base=params if light else None, background=light) as checkpointer:
        last = checkpointer.latest_step()
        adapted = jax.jit(lambda params: sj.adapt(params, rules, key=jax.random.key(0)))(params)
        state = jax.jit(optimizer.init)(sj.partition(adapted)[0])
        key, generator = jax.random.key(1), np.random.default_rng(1)
        if last is not None:
            _, adapted, state, extra = checkpointer.restore(like=state)
            key, generator.bit_generator.state = extra["key"], extra["order"]
        trainable, frozen = sj.partition(adapted)
        for number in range(0 if last is None else last + 1, STEPS):
            batch = data[generator.permutation(64)[:16]]
            trainable, state, key = step(trainable, frozen, state, key, batch)
            extra = {"key": key, "order": generator.bit_generator.state}
            checkpointer.save(number, sj.combine(trainable, frozen), opt_state=state, extra=extra)
            print(number, flush=True)
    leaves = jax.tree.leaves((sj.combine(trainable, frozen), state, jax.random.key_data(key)))
    content = b"".join(np.asarray(leaf).tobytes() for leaf in leaves)
    (pathlib.Path(folder) / "final.bin").write_bytes(content)


def start(folder, cache, light):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, __file__, str(folder), str(int(light))]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def finish(process):
    with process:
        assert process.stdout.read().split()[-1:] in ([], [str(STEPS - 1)])
    assert process.returncode == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of a run that nobody disturbed, and the cache of its compiled functions."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder / "run", folder / "cache", light=False))
    return (folder / "run" / "final.bin").read_bytes(), folder / "cache"


@pytest.mark.slow
@pytest.mark.parametrize("light", [False, True], ids=["whole", "base left out, in the background"])
def test_killed_runs_end_in_the_same_bits(tmp_path, whole, light):
    expected, cache = whole
    killed = tmp_path / "killed"
    chance = random.Random(int(light))
    reached = []
    for _ in range(3):
        with start(killed, cache, light) as process:
            # Anywhere in a step and in its save, at some steps after the start.
            seen = [process.stdout.readline() for _ in range(chance.randint(2, 4))]
            time.sleep(chance.uniform(0.0, 0.1))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert not (killed / "final.bin").exists()
        reached.append(int(seen[-1]))
    # What is written in the background may lag behind what was printed, but only by the step that was being written.
    assert all(later > earlier for earlier, later in itertools.pairwise(reached)), "a start did not go on"
    finish(start(killed, cache, light))
    assert (killed / "final.bin").read_bytes() == expected


if __name__ == "__main__":
    train(sys.argv[1], bool(int(sys.argv[2])))
