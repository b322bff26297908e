"""What the abstract trace says of every leaf."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import subspace_jax as sj

from .helpers import adapt, normal

X = normal(0, 5, 6)


def axes(role):
    return role.kind, role.stack_axes, role.in_axes, role.out_axes


# name -> (shape, function of the leaf, kind, stack, in, out, uses)
LEAVES = {
    "dense": ((6, 4), lambda w: X @ w, ("dense", (), (0,), (1,)), 1),
    "dense, transposed": ((4, 6), lambda w: X @ w.T, ("dense", (), (1,), (0,)), 1),
    "dense, cast": ((6, 4), lambda w: X.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), ("dense", (), (0,), (1,)), 1),
    "heads out": ((6, 2, 4), lambda w: jnp.einsum("bd,dhk->bhk", X, w), ("dense", (), (0,), (1, 2)), 1),
    "heads in": ((2, 3, 4), lambda w: jnp.einsum("bhk,hkd->bd", X.reshape(5, 2, 3), w), ("dense", (), (0, 1), (2,)), 1),
    "experts": ((2, 3, 4), lambda w: jnp.einsum("bek,ekd->bed", X.reshape(5, 2, 3), w), ("dense", (0,), (1,), (2,)), 1),
    "experts last": (
        (3, 4, 2),
        lambda w: jnp.einsum("bek,kde->bed", X.reshape(5, 2, 3), w),
        ("dense", (2,), (0,), (1,)),
        1,
    ),
    "scanned": ((3, 6, 6), lambda w: lax.scan(lambda x, v: (x @ v, None), X, w)[0], ("dense", (0,), (1,), (2,)), 1),
    "scanned, middle": (
        *((6, 3, 6), lambda w: lax.scan(lambda x, v: (x @ v, None), X, jnp.moveaxis(w, 1, 0))[0]),
        *(("dense", (1,), (0,), (2,)), 1),
    ),
    "scanned experts": (
        *(
            (4, 2, 3, 3),
            lambda w: lax.scan(lambda x, v: (jnp.einsum("bek,ekd->bed", x, v), None), X.reshape(5, 2, 3), w)[0],
        ),
        *(("dense", (0, 1), (2,), (3,)), 1),
    ),
    "indexed": ((3, 6, 4), lambda w: X @ w[0] + X @ w[1], ("dense", (0,), (1,), (2,)), 2),
    "indexed in a loop": (
        *((3, 6, 6), lambda w: lax.fori_loop(0, 3, lambda i, x: x @ lax.dynamic_index_in_dim(w, i, 0, False), X)),
        *(("dense", (0,), (1,), (2,)), 1),
    ),
    "shared": ((6, 6), lambda w: jnp.tanh(X @ w) @ w, ("dense", (), (0,), (1,)), 2),
    "shared in branches": (
        (6, 6),
        lambda w: lax.cond(True, lambda: X @ w, lambda: 2 * (X @ w)),
        ("dense", (), (0,), (1,)),
        2,
    ),
    "in a while loop": (
        (6, 6),
        lambda w: lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ w, X),
        ("dense", (), (0,), (1,)),
        1,
    ),
    "under remat": ((6, 4), lambda w: jax.checkpoint(lambda w: X @ w)(w), ("dense", (), (0,), (1,)), 1),
    "under jit": ((6, 4), lambda w: jax.jit(lambda w: X @ w)(w), ("dense", (), (0,), (1,)), 1),
    "under vmap": ((6, 4), lambda w: jax.vmap(lambda x: x @ w)(X), ("dense", (), (0,), (1,)), 1),
    "differentiated": ((6, 4), lambda w: jax.grad(lambda x: (x @ w).sum())(X), ("dense", (), (0,), (1,)), 2),
    "lookup": ((7, 4), lambda w: jnp.take(w, jnp.array([1, 2]), axis=0), ("embedding", (), (0,), (1,)), 1),
    "lookup by index": ((7, 4), lambda w: w[jnp.array([[1], [2]])], ("embedding", (), (0,), (1,)), 1),
    "lookup and tied output": (
        (7, 4),
        lambda w: jnp.take(w, jnp.array([1]), axis=0) @ w.T,
        ("embedding", (), (0,), (1,)),
        2,
    ),
    "tied output first": ((7, 4), lambda w: (X[:, :4] @ w.T, w[jnp.array([1])]), ("embedding", (), (0,), (1,)), 2),
    "bias": ((6,), lambda w: X + w, ("bias", (), (), ()), 1),
    "bias, reshaped": ((6,), lambda w: X[None] + w.reshape(1, 1, 6), ("bias", (), (), ()), 1),
    "bias, two axes": ((2, 3), lambda w: X.reshape(5, 2, 3) + w, ("bias", (), (), ()), 1),
    "scale": ((6,), lambda w: w * X, ("scale", (), (), ()), 1),
    "scanned bias": ((3, 6), lambda w: lax.scan(lambda x, b: (x + b, None), X, w)[0], ("bias", (0,), (), ()), 1),
    "indexed bias": ((3, 6), lambda w: X + w[0] + w[2], ("bias", (0,), (), ()), 2),
    "sliced positions": ((9, 6), lambda w: X + w[:5], ("bias", (), (), ()), 1),
    "other": ((6, 4), lambda w: jnp.sin(w), ("other", (), (), ()), 1),
    "reshaped across": ((6, 4), lambda w: X[0, :3] @ w.reshape(3, 8), ("other", (), (), ()), 1),
    "unused": ((6, 4), lambda w: X, ("unused", (), (), ()), 0),
    "only returned": ((6, 4), lambda w: w, ("unused", (), (), ()), 0),
}


@pytest.mark.parametrize("name", LEAVES)
def test_leaf(name):
    shape, fn, expected, uses = LEAVES[name]
    found = sj.roles(lambda p: fn(p["w"]), {"w": normal(1, *shape)})["w"]
    assert axes(found) == expected
    assert found.uses == uses


def test_every_leaf_of_a_linen_model_in_tree_order():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens, image):
            embed = nn.Embed(11, 8)
            x = nn.LayerNorm()(embed(tokens))
            x = x + nn.MultiHeadDotProductAttention(2)(x)
            image = nn.Conv(8, (2, 3), feature_group_count=2, kernel_dilation=2)(image)
            self.param("spare", nn.initializers.ones, (3, 3))
            return embed.attend(nn.DenseGeneral(8)(x)), nn.ConvTranspose(2, (2, 2))(image)

    model, tokens, image = Model(), np.zeros((2, 3), np.int32), normal(1, 2, 8, 8, 4)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, image))["params"]
    # Abstract parameters and abstract inputs: nothing is computed.
    abstract = jax.ShapeDtypeStruct(image.shape, image.dtype)
    found = sj.roles(
        lambda p, t, i: model.apply({"params": p}, t, i), params, jax.ShapeDtypeStruct((2, 3), np.int32), abstract
    )
    assert list(found) == [p for p, _ in sj.core.leaves_with_paths(params)]
    attention = "MultiHeadDotProductAttention_0/"
    expected = {
        "Conv_0/kernel": ("conv", (), (0, 1, 2), (3,)),
        "ConvTranspose_0/kernel": ("conv", (), (0, 1, 2), (3,)),
        "Conv_0/bias": ("bias", (), (), ()),
        "Embed_0/embedding": ("embedding", (), (0,), (1,)),
        "LayerNorm_0/scale": ("scale", (), (), ()),
        "LayerNorm_0/bias": ("bias", (), (), ()),
        attention + "query/kernel": ("dense", (), (0,), (1, 2)),
        attention + "query/bias": ("bias", (), (), ()),
        attention + "out/kernel": ("dense", (), (0, 1), (2,)),
        "DenseGeneral_0/kernel": ("dense", (), (0,), (1,)),
        "spare": ("unused", (), (), ()),
    }
    assert {p: axes(found[p]) for p in expected} == expected
    assert found["Conv_0/kernel"].groups == 2
    assert found["Embed_0/embedding"].uses == 2


def test_nnx_model():
    graph, state = nnx.split(nnx.MultiHeadAttention(2, 6, 8, rngs=nnx.Rngs(0), decode=False))
    fn = lambda state, x: nnx.merge(graph, state)(x)
    found = {p.removesuffix("/value"): r for p, r in sj.roles(fn, state, X[None]).items()}
    kernels = {p: axes(r) for p, r in found.items() if "kernel" in p}
    assert kernels["query/kernel"] == ("dense", (), (0,), (1, 2))
    assert kernels["out/kernel"] == ("dense", (), (0, 1), (2,))


def test_arguments_that_are_no_arrays_stay_what_they_are():
    def fn(p, x, flag, *, name, key, nothing=None):
        assert flag is True
        assert name == "a"
        assert nothing is None
        return x @ p["w"] * jax.random.uniform(key)

    found = sj.roles(fn, {"w": normal(0, 6, 4)}, X, True, name="a", key=jax.random.key(0))
    assert found["w"].kind == "dense"


def test_leaves_that_are_no_floating_arrays():
    def fn(p, x):
        noise = jax.random.normal(p["key"], (4,))
        return x @ p["w"] * p["factor"] + noise + p["table"][p["count"]]

    params = {
        "w": normal(0, 6, 4),
        "key": jax.random.key(0),
        "count": np.int32(2),
        "factor": 2.0,
        "table": normal(0, 3, 4),
    }
    found = sj.roles(fn, params, X)
    assert found["w"].kind == "dense"
    assert set(found) >= {"w", "count", "table"}
    same = sj.roles(fn, {**params, "key": jax.random.PRNGKey(0), "name": "text"}, X)
    assert same["w"].kind == "dense"


def test_adapted_leaves_are_left_alone():
    adapted = adapt({"a": normal(0, 6, 4), "b": normal(1, 4, 3)}, "a")
    found = sj.roles(lambda p: X @ p["a"] @ p["b"], adapted)
    assert list(found) == ["b"]
    assert axes(found["b"]) == ("dense", (), (0,), (1,))


def test_the_function_is_traced_once_and_nothing_runs():
    calls = []

    def fn(p, x):
        jax.debug.callback(lambda: calls.append("ran"))
        calls.append("traced")
        return x @ p

    sj.roles(fn, normal(0, 6, 4), X)
    assert calls == ["traced"]


def test_a_huge_model_costs_nothing():
    """Arrays of a terabyte that exist as shapes only."""
    big = jax.ShapeDtypeStruct((500_000, 500_000), jnp.float32)
    found = sj.roles(lambda p, x: x @ p["w"], {"w": big}, jax.ShapeDtypeStruct((8, 500_000), jnp.float32))
    assert found["w"].kind == "dense"


def test_errors_of_the_function_come_through():
    with pytest.raises(TypeError, match="dot_general"):
        sj.roles(lambda p: X @ p, normal(0, 5, 4))
