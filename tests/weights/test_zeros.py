"""Zeros at the start, made and used in one program, where constants give garbage in batched products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.methods import lora_sb, o_lora
from subspace_jax.weights import hidden_zeros
from tests.tolerances import tolerance

METHODS = {
    "lora": lambda: sj.lora(32),
    "flora": lambda: sj.flora(32),
    "o_lora": lambda: sj.o_lora(32, tasks=1),
    "oft": lambda: sj.oft(32),
    "loca": lambda: sj.loca(32, evaluation="factored"),
    "randlora": lambda: sj.randlora(32, route="factored"),
    "s2ft_in": lambda: sj.s2ft(0.5),
    "s2ft_out": lambda: sj.s2ft(0.5, side="out"),
    "loldu": lambda: sj.loldu(32, start="zeros", route="factored", residual="exact"),
    "lora_xs": lambda: lora_sb.lora_xs(32, noise=0.0),
    "dora": lambda: sj.dora(sj.lora(32)),
    "matryoshka": lambda: sj.matryoshka(sj.lora(32)),
}


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_they_are_zeros_for_every_key(shape, dtype):
    for key in (jax.random.key(0), jax.random.PRNGKey(7)):
        found = hidden_zeros(key, shape, dtype)
        assert (found.shape, found.dtype) == (shape, dtype)
        assert not np.asarray(found, np.float32).any()
        assert not np.signbit(np.asarray(found, np.float32)).any()


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(("rows", "inputs"), [(256, 64), (32, 32), (64, 128)])
def test_a_batched_product_with_them_is_zero(rows, inputs, constant):
    """With `jnp.zeros` it is 4e15 or NaN, on jaxlib 0.10.2 and 0.12."""
    key, g = jax.random.key(0), jnp.ones((16, rows, 32))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, rows, inputs)), jnp.float32)

    def total(x, key):
        return jnp.sum((x @ hidden_zeros(key, (inputs, 32))) * g, axis=(1, 2))

    found = jax.jit(lambda x: total(x, key))(x) if constant else jax.jit(total)(x, key)
    np.testing.assert_array_equal(found, np.zeros(16))


@pytest.mark.parametrize("method", METHODS)
def test_adapted_and_used_in_one_program_under_vmap(method):
    """LoRA of rank 32 gave 6e11 and NaN here."""
    batch, rows, size = 4, 64, 64
    rng = np.random.default_rng(1)
    w, x, g = (rng.normal(size=s) for s in ((size, size), (batch, rows, size), (batch, rows, size)))
    expected = np.einsum("bni,io,bno->b", x, w, g)
    w, x, g = (jnp.asarray(v, jnp.float32) for v in (w, x, g))

    def loss(key, x, g):
        adapted = sj.adapt({"w": w}, {"w": METHODS[method]()}, key=key)
        trainable, frozen = sj.partition(adapted)
        fn = sj.with_adapters(lambda p, x: x @ p["w"])
        return jax.value_and_grad(lambda t: jnp.sum(fn(sj.combine(t, frozen), x) * g))(trainable)

    found, gradients = jax.jit(jax.vmap(loss))(jax.random.split(jax.random.key(3), batch), x, g)
    scale = float(np.sqrt(np.sum(np.einsum("bni,io->bno", x, w) ** 2 * np.asarray(g) ** 2)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance("float32", size, scale))
    assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves(gradients))


def test_the_next_task_starts_at_zero_in_one_program_with_its_use():
    rng = np.random.default_rng(2)
    w, x = jnp.asarray(rng.normal(size=(64, 64)), jnp.float32), jnp.asarray(rng.normal(size=(4, 64, 64)), jnp.float32)
    adapted = sj.adapt({"w": w}, {"w": sj.o_lora(32, tasks=1)}, key=jax.random.key(0))

    def total(key, x, adapted):
        fn = sj.with_adapters(lambda p, x: x @ p["w"])
        return jnp.sum(fn(o_lora.next_task(adapted, 0, key=key), x) - x @ w)

    keys = jax.random.split(jax.random.key(1), 4)
    found = jax.jit(jax.vmap(total, in_axes=(0, 0, None)))(keys, x, adapted)
    np.testing.assert_allclose(found, np.zeros(4), atol=tolerance("float32", 64 * 64, 64.0))
