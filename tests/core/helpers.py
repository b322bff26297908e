"""Reference values by numpy, and one check that runs a model on them beside the adapted tree."""

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj
from subspace_jax.weights import LowRank

RANK, SCALE = 2, 1.5


def normal(seed, *shape, dtype=np.float32):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), np.float32).astype(dtype)


def lora():
    return sj.lora(RANK, alpha=RANK * SCALE)


def randomized(adapted, seed=7):
    """LoRA starts at zero; random factors make every part of the product count."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        if not isinstance(leaf, LowRank):
            return leaf
        a, b = (jnp.asarray(0.3 * rng.standard_normal(v.shape), v.dtype) for v in (leaf.a, leaf.b))
        return LowRank(**{**vars(leaf), "a": a, "b": b})

    return jax.tree.map(one, adapted, is_leaf=sj.core.is_weight)


def adapt(params, rules="**", roles=None, seed=7):
    """The tree with LoRA of random factors where `rules` say, or where a glob matches."""
    rules = {rules: lora()} if isinstance(rules, str) else rules
    return randomized(sj.adapt(params, rules, key=jax.random.key(seed), roles=roles), seed)


def _order(weight):
    role = weight.role
    return [*role.stack_axes, *role.in_axes, *role.out_axes]


def dense(weight):
    """base + s a b, folded by numpy."""
    if not isinstance(weight, LowRank):
        return weight.value if sj.core.is_weight(weight) else weight
    base = np.asarray(weight.base, np.float64)
    product = weight.scale * (np.asarray(weight.a, np.float64) @ np.asarray(weight.b, np.float64))
    order = _order(weight)
    folded = product.reshape([base.shape[i] for i in order]).transpose(np.argsort(order))
    return jnp.asarray((base + folded).astype(weight.dtype))


def merged(tree):
    return jax.tree.map(dense, tree, is_leaf=sj.core.is_weight)


def factor_gradients(gradient, weight):
    """dA = s G B^T and dB = s A^T G of a dense gradient G."""
    a, b = np.asarray(weight.a, np.float64), np.asarray(weight.b, np.float64)
    matrix = np.asarray(gradient, np.float64).transpose(_order(weight))
    matrix = matrix.reshape(*a.shape[:-1], b.shape[-1])
    return weight.scale * matrix @ b.swapaxes(-1, -2), weight.scale * a.swapaxes(-1, -2) @ matrix


def close(actual, expected, tolerance=2e-4):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance * max(1.0, np.abs(expected).max(initial=0))
    )


def trees_close(actual, expected, tolerance=2e-4):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        close(one, other, tolerance)


def weighted_sum(results):
    """A scalar in which every entry of every floating result has a weight of its own."""
    total = jnp.zeros((), jnp.float32)
    for i, leaf in enumerate(jax.tree.leaves(results)):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            total += jnp.sum(leaf.astype(jnp.float32) * normal(100 + i, *jnp.shape(leaf)))
    return total


def same_as_dense(fn, adapted, *args, tolerance=2e-4, gradients=True, custom_rules="keep", **kwargs):
    """Checks results and gradients of `fn` on the adapted tree against `fn` itself on numpy's merged arrays."""
    apply, plain = sj.with_adapters(fn, custom_rules=custom_rules), merged(adapted)
    trainable, frozen = sj.partition(adapted)

    def adapted_loss(trainable, frozen):
        out = apply(sj.combine(trainable, frozen), *args, **kwargs)
        return weighted_sum(out), out

    def dense_loss(plain):
        out = fn(plain, *args, **kwargs)
        return weighted_sum(out), out

    @jax.jit
    def both(trainable, frozen, plain):
        if not gradients:
            return (None, adapted_loss(trainable, frozen)[1]), (None, dense_loss(plain)[1])
        return jax.grad(adapted_loss, has_aux=True)(trainable, frozen), jax.grad(dense_loss, has_aux=True)(plain)

    (found, out), (wanted, expected) = both(trainable, frozen, plain)
    if gradients:
        compare_gradients(found, wanted, adapted, tolerance)
    trees_close(out, expected, tolerance)


def compare_gradients(found, wanted, adapted, tolerance=2e-4):
    leaves = jax.tree.leaves(adapted, is_leaf=sj.core.is_weight)
    for weight, one, gradient in zip(
        leaves,
        jax.tree.leaves(found, is_leaf=lambda v: sj.core.is_weight(v) or v is None),
        jax.tree.leaves(wanted),
        strict=True,
    ):
        if isinstance(weight, LowRank):
            for part, reference in zip((one.a, one.b), factor_gradients(gradient, weight), strict=True):
                close(part, reference, tolerance)
        elif sj.core.is_weight(weight):
            close(one.value, gradient, tolerance)
        else:
            assert one is None
