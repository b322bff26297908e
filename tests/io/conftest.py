import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj


def _plain(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


@pytest.fixture
def assert_same_bits():
    """Fails unless two trees are of one structure and every leaf has the same type, dtype, weakness and bytes."""

    def check(left, right):
        assert jax.tree.structure(left) == jax.tree.structure(right)
        flat = zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True)
        for (path, one), other in flat:
            where = jax.tree_util.keystr(path)
            assert type(one) is type(other), where
            if not hasattr(one, "dtype"):
                assert repr(one) == repr(other), where
                continue
            assert one.dtype == other.dtype, where
            assert getattr(one, "weak_type", None) == getattr(other, "weak_type", None), where
            one, other = np.asarray(_plain(one)), np.asarray(_plain(other))
            assert one.shape == other.shape, where
            assert one.tobytes() == other.tobytes(), where

    return check


@pytest.fixture
def params():
    """A mixed tree: float32 and bfloat16, a stack of kernels, lists, tuples, None, integers."""
    drawn = np.random.default_rng(0).normal
    return {
        "embed": jnp.asarray(drawn(size=(7, 4)), jnp.float32),
        "blocks": [
            {"kernel": jnp.asarray(drawn(size=(4, 6)), jnp.float32), "bias": jnp.zeros(6)},
            {"kernel": jnp.asarray(drawn(size=(6, 4)), jnp.bfloat16), "bias": None},
        ],
        "stacked": {"kernel": jnp.asarray(drawn(size=(3, 4, 5)), jnp.float32)},
        "norm": (jnp.ones(4, jnp.bfloat16), (jnp.arange(3), np.arange(4, dtype=np.int64))),
    }


@pytest.fixture
def adapted(params):
    tree = sj.adapt(
        params,
        {
            "stacked/kernel": sj.lora(rank=2, alpha=3.0),
            "**/kernel": sj.lora(rank=2, dtype=jnp.bfloat16, dropout=0.25),
            "embed": sj.full(),
        },
        key=jax.random.key(1),
        roles={"stacked/kernel": sj.Role.dense((1,), (2,), stack_axes=(0,))},
    )
    # Factors that start at zero would hide an array put in the wrong place.
    trainable, frozen = sj.partition(tree)
    drawn = np.random.default_rng(2).normal
    moved = jax.tree.map(lambda x: x + jnp.asarray(drawn(size=x.shape), x.dtype), trainable)
    return sj.combine(moved, frozen)
