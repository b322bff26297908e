"""Methods beside each other in one model, inside each other, and many adapters of one kind at once."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import leaves_with_paths

WIDTH = 8


class Block(nn.Module):
    """Six kernels and two norms."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm")(x)
        query, key, value = (nn.DenseGeneral((2, 4), name=n)(y) for n in ("query", "key", "value"))
        attended = nn.dot_product_attention(query, key, value)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(attended)
        y = nn.LayerNorm(name="mlp_norm")(x)
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(2 * WIDTH, name="up")(y)))


MODEL = nn.Sequential([Block(), Block(), nn.Dense(3)])
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, WIDTH)), jnp.float32)
PARAMS = jax.jit(MODEL.init)(jax.random.key(0), X)["params"]
ROLES = sj.roles(lambda p, x: MODEL.apply({"params": p}, x), PARAMS, X)

SHARED = sj.randlora(2)
SIX = {
    "layers_2/*": sj.full(),
    "**/query/kernel": sj.lora(2),
    "**/key/kernel": sj.soka(2),
    "**/value/kernel": sj.dora(sj.pissa(2)),
    "**/out/kernel": SHARED,
    "**/up/kernel": sj.lift(1, filter_rank=2),
    "**/down/kernel": sj.matryoshka(sj.lora(4)),
    "**/norm/*": sj.ssf(),
}


def adapted(rules=SIX, seed=1):
    return sj.adapt(PARAMS, rules, key=jax.random.key(seed), roles=ROLES)


def apply(params, x):
    return MODEL.apply({"params": params}, x)


run = sj.with_adapters(apply)


def test_many_kinds_in_one_model_learn_in_one_step():
    tree = adapted()
    kinds = {type(w).__name__ for _, w in leaves_with_paths(tree) if sj.core.is_weight(w)}
    assert len(kinds) >= 8
    trainable, frozen = sj.partition(tree)
    optimizer, traces = optax.adam(1e-2), []

    @jax.jit
    def step(trainable, state):
        traces.append(None)

        def loss(trainable):
            logits = run(sj.combine(trainable, frozen), X).mean(1)
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4) % 3).mean()

        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(trainable, updates), state, value

    state, losses, start = optimizer.init(trainable), [], trainable
    for _ in range(12):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    assert len(traces) == 1
    for (path, before), (_, after) in zip(leaves_with_paths(start), leaves_with_paths(trainable), strict=True):
        pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
        assert not pairs or any(not jnp.array_equal(a, b) for a, b in pairs), f"{path} did not learn"
    whole = sj.combine(trainable, frozen)
    np.testing.assert_allclose(apply(sj.merge(whole), X), run(whole, X), rtol=2e-4, atol=2e-5)


def test_a_mixture_survives_a_checkpoint(tmp_path):
    tree = adapted()
    sj.save_checkpoint(tmp_path / "run", 0, tree)
    back = sj.restore_checkpoint(tmp_path / "run").adapted
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    np.testing.assert_array_equal(run(back, X), run(tree, X))


@pytest.mark.parametrize(
    "method",
    [
        sj.dora(sj.pissa(2)),
        sj.matryoshka(sj.lora(4)),
        sj.dora(sj.matryoshka(sj.lora(4))),
        sj.dora(sj.qpissa(2, steps=1)),
        sj.dora(sj.flora(2)),
        sj.dora(sj.soka(2)),
        sj.dora(sj.randlora(2)),
        sj.dora(sj.loca(6)),
        sj.dora(sj.oft(4)),
    ],
    ids=lambda method: method.name,
)
def test_methods_compose(method):
    tree = adapted({"**/up/kernel": method, "**/query/kernel": method})
    trainable, frozen = sj.partition(tree)
    rng = np.random.default_rng(2)
    moved = sj.combine(jax.tree.map(lambda v: v + 0.1 * rng.normal(size=v.shape).astype(v.dtype), trainable), frozen)
    np.testing.assert_allclose(run(moved, X), apply(sj.merge(moved), X), rtol=2e-4, atol=2e-5)
    gradients = jax.grad(lambda t: jnp.sin(run(sj.combine(t, frozen), X)).sum())(trainable)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    "method", [sj.lora(2), sj.randlora(2), sj.soka(2), sj.lift(1, filter_rank=2)], ids=lambda m: m.name
)
def test_many_adapters_of_one_kind_in_one_batch(method):
    """Each example of a batch with an adapter of its own, the base once."""
    tree = adapted({"**/up/kernel": method})
    trainable, frozen = sj.partition(tree)
    rng = np.random.default_rng(3)
    bank = jax.tree.map(lambda v: v + 0.1 * jnp.asarray(rng.normal(size=(3, *v.shape)), v.dtype), trainable)
    chosen = jnp.array([2, 0, 1, 0])

    @jax.jit
    def serve(bank, x):
        own = jax.tree.map(lambda v: v[chosen], bank)
        return jax.vmap(lambda adapter, one: run(sj.combine(adapter, frozen), one[None])[0])(own, x)

    outputs = serve(bank, X)
    for i, which in enumerate(chosen):
        one = sj.combine(jax.tree.map(lambda v, which=which: v[which], bank), frozen)
        np.testing.assert_allclose(outputs[i], run(one, X[i : i + 1])[0], rtol=2e-4, atol=2e-5)
