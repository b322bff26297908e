"""GIST on 8 devices, beside one: run by `test_sharded.py` in a process of its own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import subspace_jax as sj
from subspace_jax.methods.analysis.gist import example_gradients, fit_subspace, score_examples
from tests.eight_devices import KINDS, make_mesh
from tests.tolerances import assert_rounding

RNG = np.random.default_rng(0)
PARAMS = {
    "up": jnp.asarray(RNG.normal(size=(64, 128)) / 8, jnp.float32),
    "down": jnp.asarray(RNG.normal(size=128)),
    "shift": jnp.float32(0.1),
}
LAYOUT = {"up": P(None, "model"), "down": P("model"), "shift": P()}


def fn(p, x):
    """On a mesh of explicit axes a sum over a split axis must say what becomes of it."""
    hidden = jnp.tanh(x @ p["up"])
    explicit = jax.typeof(hidden).sharding.mesh.explicit_axes
    return jnp.matmul(hidden, p["down"], out_sharding=P() if explicit else None) + p["shift"]


apply = sj.with_adapters(fn)


def loss(adapted, example):
    return (apply(adapted, example["x"]) - example["y"]) ** 2


def examples(count):
    return {"x": np.float32(RNG.normal(size=(count, 64))), "y": np.float32(RNG.normal(size=count))}


def select(adapted, validation, pool):
    trainable, frozen = sj.partition(adapted)
    target = fit_subspace(loss, trainable, validation, rank=5, frozen=frozen)
    return target, score_examples(loss, trainable, target, pool, frozen=frozen, batch_size=16)


def main():
    """Compares scores, and looks at what the program of a batch holds and moves."""
    meshes = {kind: make_mesh(kind) for kind in KINDS}
    adapted = sj.adapt(PARAMS, {"up": sj.lora(3), "shift": sj.full()}, key=jax.random.key(0))
    trainable, frozen = sj.partition(adapted)
    adapted = sj.combine(jax.tree.map(lambda v: v + 0.1, trainable), frozen)
    validation, pool = examples(8), examples(40)
    want, expected = select(adapted, validation, pool)
    for kind, mesh in meshes.items():
        check(kind, mesh, adapted, validation, pool, want, expected)


def check(kind, mesh, adapted, validation, pool, want, expected):
    base = jax.tree.map(lambda v, s: jax.device_put(v, NamedSharding(mesh, s)), PARAMS, LAYOUT)
    split = NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, adapted, sj.shardings(adapted, base))
        spread = [jax.tree.map(lambda v: jax.device_put(v, split), one) for one in (validation, pool)]
        for given in ([validation, pool], spread):
            target, scores = select(placed, *given)
            assert_rounding(np.abs(target.targets), np.abs(want.targets), size=512)
            assert_rounding(scores.scores, expected.scores, size=512)
            assert_rounding(scores.shares, expected.shares, size=512)
        print(f"{kind}: the same scores")
        trainable, frozen = sj.partition(placed)
        compiled = example_gradients.lower(loss, trainable, spread[1], frozen).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    for gradient in jax.tree.leaves(compiled.output_shardings):
        assert gradient.spec[0] == "data", gradient
    print(f"{kind}: gradients stay with their examples")


if __name__ == "__main__":
    main()
