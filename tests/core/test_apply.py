"""`with_adapters` on Linen, NNX and plain functions, under JAX's transformations."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import subspace_jax as sj
from subspace_jax.core import MaterializeError

from .helpers import adapt, close, compare_gradients, lora, merged, normal, same_as_dense, trees_close, weighted_sum

X = normal(0, 4, 5, 6)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None, *, train=False):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, dropout_rate=0.3, deterministic=not train)(
            y, mask=mask
        )
        x = x + y
        y = nn.Dense(12, use_bias=False)(nn.LayerNorm()(x))
        y = nn.Dropout(0.5, deterministic=not train)(nn.gelu(y))
        return x + nn.Dense(6)(y)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), strides=2)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.Conv(8, (3, 3), feature_group_count=2, kernel_dilation=2)(nn.relu(x))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x)
        return nn.Dense(3)(x.mean((1, 2)))


class Language(nn.Module):
    """Embedding with tied output around scanned, rematerialized blocks."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 6)
        body = nn.remat(lambda block, x, _: (block(x), None), prevent_cse=False)
        blocks = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = blocks(Block(name="blocks"), embed(tokens), None)
        return embed.attend(x)


@functools.cache
def linen(model, *shape):
    return model, init(model, jnp.zeros(shape))


def init(model, *args):
    return jax.jit(model.init)(jax.random.key(0), *args)["params"]


def block():
    return linen(Block(), 1, 5, 6)


KERNELS = {"**/kernel": lora()}


@functools.cache
def adapted_block():
    model, params = block()
    fn = lambda p, x: model.apply({"params": p}, x)
    return fn, adapt(params, KERNELS, sj.roles(fn, params, X))


def test_linen_attention_block():
    fn, adapted = adapted_block()
    same_as_dense(fn, adapted, X)
    query = adapted["MultiHeadDotProductAttention_0"]["query"]["kernel"]
    output = adapted["MultiHeadDotProductAttention_0"]["out"]["kernel"]
    assert (query.a.shape, query.b.shape) == ((6, 2), (2, 8))
    assert (output.a.shape, output.b.shape) == ((8, 2), (2, 6))


def test_linen_keyword_arguments_rngs_and_masks():
    model, _ = block()
    _, adapted = adapted_block()
    mask = nn.make_causal_mask(X[..., 0])
    rngs = {"dropout": jax.random.key(2)}
    fn = lambda p, x, **kwargs: model.apply({"params": p}, x, **kwargs)
    same_as_dense(fn, adapted, X, mask=mask, train=True, rngs=rngs, tolerance=1e-3)


def test_linen_mutable_collections():
    model = ConvNet()
    image = normal(1, 2, 8, 8, 3)
    variables = jax.jit(model.init)(jax.random.key(0), image)
    fn = lambda p, x: model.apply(
        {"params": p, "batch_stats": variables["batch_stats"]}, x, train=True, mutable=["batch_stats"]
    )
    roles = sj.roles(fn, variables["params"], image)
    assert {roles[f"{n}/kernel"].kind for n in ("Conv_0", "Conv_1", "ConvTranspose_0")} == {"conv"}
    assert roles["Conv_1/kernel"].groups == 2
    adapted = adapt(variables["params"], KERNELS, roles)
    same_as_dense(fn, adapted, image, tolerance=1e-3)
    _, state = sj.with_adapters(fn)(adapted, image)
    assert not np.allclose(state["batch_stats"]["BatchNorm_0"]["mean"], 0)


def test_linen_scan_remat_and_tied_embedding():
    model = Language()
    tokens = np.array([[1, 2, 10], [0, 4, 4]])
    params = init(model, tokens)
    fn = lambda p, t: model.apply({"params": p}, t)
    roles = sj.roles(fn, params, tokens)
    adapted = adapt(params, {"**/kernel": lora(), "Embed_0/*": lora()}, roles)
    assert adapted["blocks"]["Dense_0"]["kernel"].a.shape == (3, 6, 2)
    assert adapted["Embed_0"]["embedding"].role.kind == "embedding"
    same_as_dense(fn, adapted, tokens, tolerance=1e-3)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_linen_scan_with_parameters_stacked_on_any_axis(axis):
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x, scales):
            body = lambda dense, x, scale: (jnp.tanh(dense(x)) * scale, None)
            scanned = nn.scan(body, variable_axes={"params": axis}, split_rngs={"params": True}, in_axes=0, length=3)
            return scanned(nn.Dense(6), x, scales)[0]

    model, scales = Stack(), normal(2, 3)
    params = init(model, X, scales)
    fn = lambda p, x: model.apply({"params": p}, x, scales)
    roles = sj.roles(fn, params, X)
    assert roles["Dense_0/kernel"].stack_axes == (axis % 3,)
    same_as_dense(fn, adapt(params, KERNELS, roles), X)


def test_linen_vmapped_experts():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3
            )
            each = nn.vmap(nn.DenseGeneral, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)
            return each((2, 3))(dense(8)(x))

    model = Experts()
    params = init(model, X)
    fn = lambda p, x: model.apply({"params": p}, x)
    roles = sj.roles(fn, params, X)
    # The first experts share one input, so nothing in the program tells their axis from an output axis.
    assert roles["VmapDenseGeneral_0/kernel"].stack_axes == (0,)
    adapted = adapt(params, KERNELS, roles)
    same_as_dense(fn, adapted, X)
    same_as_dense(fn, adapt(params, KERNELS, {"VmapDense_0/kernel": sj.Role.dense((1,), (2,), (0,)), **roles}), X)


def test_linen_einsum_and_partitioned_parameters():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Einsum((6, 2, 4), "btd,dhk->bthk")(x)
            boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.DenseGeneral(3, axis=(-2, -1), kernel_init=boxed)(x)

    model = Model()
    params = init(model, X)
    fn = lambda p, x: model.apply({"params": p}, x)
    roles = sj.roles(fn, params, X)
    assert roles["Einsum_0/kernel"].out_axes == (1, 2)
    adapted = adapt(params, {"**/kernel": lora()}, roles)
    assert sj.core.is_weight(adapted["DenseGeneral_0"]["kernel"].value)
    same_as_dense(fn, adapted, X)


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 6, 8, rngs=rngs, decode=False)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.hidden = nnx.Linear(6, 12, rngs=rngs)
        self.out = nnx.LinearGeneral((3, 4), (2, 3), axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        x = self.norm(x + self.attention(x))
        return self.out(nnx.gelu(self.hidden(x)).reshape(*x.shape[:-1], 3, 4))


def test_nnx_pure_dict_with_batch_statistics():
    graph, state, rest = nnx.split(NNXModel(nnx.Rngs(0)), nnx.Param, ...)
    params = nnx.to_pure_dict(state)

    def fn(params, x):
        filled = jax.tree.map(lambda v: v, state)
        nnx.replace_by_pure_dict(filled, params)
        model = nnx.merge(graph, filled, rest, copy=True)
        y = model(x)
        return y, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    roles = sj.roles(fn, params, X)
    assert roles["out/kernel"].in_axes == (0, 1)
    adapted = adapt(params, KERNELS, roles)
    same_as_dense(fn, adapted, X, tolerance=1e-3)
    before = np.asarray(nnx.to_pure_dict(rest)["norm"]["mean"])
    after = sj.with_adapters(fn)(adapted, X)[1]["norm"]["mean"]
    assert not np.allclose(before, after)


def test_nnx_state_with_variables_as_leaves():
    graph, state = nnx.split(nnx.Linear(6, 3, rngs=nnx.Rngs(0)))
    fn = lambda state, x: nnx.merge(graph, state)(x)
    roles = sj.roles(fn, state, X)
    adapted = adapt(state, {"kernel*/**": lora()}, roles)
    assert sj.core.is_weight(jax.tree.leaves(adapted, is_leaf=sj.core.is_weight)[1])
    close(sj.with_adapters(fn)(adapted, X), fn(merged(adapted), X))


def mlp(p, x):
    return jnp.tanh(x @ p["in"] + p["bias"]) @ p["out"]


def plain(seed=0):
    return {"bias": normal(seed, 8), "in": normal(seed + 1, 6, 8), "out": normal(seed + 2, 8, 3)}


ADAPT_MLP = {"in": lora(), "out": lora(), "bias": sj.full()}


def test_value_and_grad_with_auxiliary_output():
    adapted = adapt(plain(), ADAPT_MLP)
    trainable, frozen = sj.partition(adapted)
    apply = sj.with_adapters(mlp)

    @jax.jit
    def step(trainable, x):
        def loss(t):
            y = apply(sj.combine(t, frozen), x)
            return weighted_sum(y), {"logits": y}

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    (value, aux), found = step(trainable, X)
    dense = merged(adapted)
    expected, wanted = jax.value_and_grad(lambda p: weighted_sum(mlp(p, X)))(dense)
    close(value, expected)
    close(aux["logits"], mlp(dense, X))
    compare_gradients(found, wanted, adapted)


def test_vmap_over_a_stack_of_adapters():
    many = [adapt(plain(), ADAPT_MLP, seed=s) for s in range(3)]
    trainables = [sj.partition(a)[0] for a in many]
    frozen = sj.partition(many[0])[1]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *trainables)
    xs = normal(5, 3, 4, 6)

    def run(trainable, x):
        return sj.with_adapters(mlp)(sj.combine(trainable, frozen), x)

    found = jax.jit(jax.vmap(run))(stacked, xs)
    for i, one in enumerate(many):
        close(found[i], mlp(merged(one), xs[i]))
    # One example each: a batch in which every row has an adapter of its own.
    rows = jax.vmap(lambda who, x: run(jax.tree.map(lambda v: v[who], stacked), x))(np.array([2, 0, 1, 1]), X[:, 0])
    for row, who in enumerate([2, 0, 1, 1]):
        close(rows[row], mlp(merged(many[who]), X[row, 0]))


def test_vmap_of_gradients_is_per_example():
    adapted = adapt(plain(), ADAPT_MLP)
    trainable, frozen = sj.partition(adapted)
    apply = sj.with_adapters(mlp)
    found = jax.vmap(jax.grad(lambda t, x: apply(sj.combine(t, frozen), x).sum()), (None, 0))(trainable, X)
    for i in range(len(X)):
        wanted = jax.grad(lambda p, i=i: mlp(p, X[i]).sum())(merged(adapted))
        compare_gradients(jax.tree.map(lambda v, i=i: v[i], found), wanted, adapted)


def test_hessian_vector_product():
    adapted = adapt(plain(), {"in": lora()})
    trainable, frozen = sj.partition(adapted)
    apply = sj.with_adapters(mlp)
    loss = lambda t: (apply(sj.combine(t, frozen), X) ** 2).mean()
    direction = jax.tree.map(jnp.ones_like, trainable)
    product = jax.jvp(jax.grad(loss), (trainable,), (direction,))[1]
    moved = lambda s: jax.grad(loss)(jax.tree.map(lambda v, d: v + s * d, trainable, direction))
    for one, up, down in zip(*(jax.tree.leaves(t) for t in (product, moved(3e-3), moved(-3e-3))), strict=True):
        close(one, (up - down) / 6e-3, 5e-3)


def test_nested():
    adapted = adapt(plain(), ADAPT_MLP)
    twice = sj.with_adapters(sj.with_adapters(mlp))
    trees_close(twice(adapted, X), mlp(merged(adapted), X))

    def outer(p, x):
        inner = adapt({"w": normal(9, 3, 3)})
        return sj.with_adapters(lambda q, y: y @ q["w"])(inner, mlp(p, x))

    expected = mlp(merged(adapted), X) @ merged(adapt({"w": normal(9, 3, 3)}))["w"]
    trees_close(jax.jit(sj.with_adapters(outer))(adapted, X), expected)


def test_adapter_of_an_adapter():
    """A weight whose base is a weight: low rank over low rank."""
    first = adapt({"w": normal(1, 6, 4)})["w"]
    second = dataclasses.replace(first, base=first, a=first.a + 1)
    expected = np.asarray(merged({"w": first})["w"], np.float64)
    expected = expected + first.scale * (np.asarray(first.a, np.float64) + 1) @ np.asarray(first.b, np.float64)
    close(sj.with_adapters(lambda p: X @ p)(second), X @ expected)
    close(second.materialize(), expected)


def test_weights_in_any_argument_and_any_result():
    @dataclasses.dataclass
    class Plain:
        name: str

    adapted = adapt(plain(), ADAPT_MLP)
    tag = Plain("as it came")

    def fn(x, flag, *, params, label, extra=None):
        assert flag is True
        assert label == "text"
        assert extra is None
        y = mlp(params, x)
        return {"y": y, "label": label, "none": None, "pair": (3, 2.5, tag), "w": params["in"], "x": x, "first": y[0]}

    found = sj.with_adapters(fn)(X, True, params=adapted, label="text")
    assert found["label"] == "text"
    assert found["none"] is None
    assert found["pair"] == (3, 2.5, tag)
    assert sj.core.is_weight(found["w"])
    np.testing.assert_array_equal(found["w"].base, adapted["in"].base)
    np.testing.assert_array_equal(found["x"], X)
    close(found["y"], mlp(merged(adapted), X))


def test_weight_that_is_returned_changed_is_formed_only_where_allowed():
    adapted = adapt(plain(), {"in": lora()})
    for change in (lambda w: w.T, lambda w: w.astype(jnp.bfloat16)):
        fn = lambda p, change=change: change(p["in"])
        with pytest.raises(MaterializeError, match=r"in: .*the result of the function"):
            sj.with_adapters(fn)(adapted)
        trees_close(sj.with_adapters(fn, on_materialize="allow")(adapted), fn(merged(adapted)), 1e-2)


def test_arguments_without_weights_are_the_callers_own_objects():
    """What the function changes in place is not a copy."""
    linear, seen = nnx.Linear(6, 6, rngs=nnx.Rngs(0)), {}

    def fn(p, model, log):
        assert model is linear
        log["called"] = True
        return model(X) @ p["w"]

    sj.with_adapters(fn)(adapt({"w": normal(1, 6, 4)}), linear, seen)
    assert seen == {"called": True}


def test_without_weights_the_function_runs_as_it_is():
    params = plain()
    calls = []
    fn = lambda p, x: calls.append(type(x)) or mlp(p, x)
    trees_close(sj.with_adapters(fn)(params, X), mlp(params, X))
    assert calls == [np.ndarray]


def test_wrapped_function_keeps_its_name_and_static_arguments():
    @functools.partial(jax.jit, static_argnames=("activation", "times"))
    def fn(p, x, times, activation="tanh"):
        for _ in range(times):
            x = getattr(jnp, activation)(x @ p["w"])
        return x

    wrapped = sj.with_adapters(fn)
    assert wrapped.__name__ == "fn"
    adapted = adapt({"w": normal(1, 6, 6)})
    close(wrapped(adapted, X, 2, activation="sin"), fn(merged(adapted), X, 2, activation="sin"))
    jitted = jax.jit(wrapped, static_argnames=("activation", "times"))
    close(jitted(adapted, X, times=2, activation="sin"), fn(merged(adapted), X, 2, activation="sin"))


def test_one_trace_for_equal_shapes():
    traces = []

    def fn(p, x):
        traces.append(1)
        return mlp(p, x)

    trainable, frozen = sj.partition(adapt(plain(), ADAPT_MLP))
    apply = sj.with_adapters(fn)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(trainable, frozen, x):
        return jax.grad(lambda t: apply(sj.combine(t, frozen), x).sum())(trainable)

    for scale in (1.0, 2.0, 3.0):
        step(jax.tree.map(lambda v, s=scale: v * s, trainable), frozen, X * np.float32(scale))
    assert len(traces) == 1
    other, other_frozen = sj.partition(adapt(plain(5), ADAPT_MLP, seed=3))
    step(other, other_frozen, X)
    assert len(traces) == 1


def test_bfloat16_compute_with_float32_parameters():
    model = nn.Dense(4, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    x = normal(1, 3, 6)
    params = init(model, x)
    adapted = adapt(params, KERNELS)
    fn = lambda p, x: model.apply({"params": p}, x)
    found = sj.with_adapters(fn)(adapted, x)
    assert found.dtype == jnp.bfloat16
    dense = np.asarray(merged(adapted)["kernel"], np.float64)
    close(found, x @ dense, 3e-2)
    # Every product runs in bfloat16, and every factor's gradient is float32.
    jaxpr = jax.make_jaxpr(sj.with_adapters(fn))(adapted, x)
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 3
    assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype(jnp.bfloat16)}
    trainable, frozen = sj.partition(adapted)
    gradients = jax.grad(lambda t: sj.with_adapters(fn)(sj.combine(t, frozen), x).astype(jnp.float32).sum())(trainable)
    assert {v.dtype for v in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters(dtype):
    adapted = adapt({"w": normal(1, 6, 4).astype(dtype)})
    x = jnp.asarray(normal(2, 3, 6), dtype)
    fn = lambda p: x @ p["w"]
    found = sj.with_adapters(fn)(adapted)
    assert found.dtype == dtype
    assert adapted["w"].a.dtype == jnp.float32
    weight = adapted["w"]
    exact = np.asarray(weight.base, np.float64) + weight.scale * np.asarray(weight.a, np.float64) @ np.asarray(weight.b)
    close(found, np.asarray(x, np.float64) @ exact, 3e-2)


def test_products_are_bracketed_around_the_rank():
    """No product has two large axes of the weight: x W, x a and (x a) b only, and no gradient of W."""
    adapted = adapt({"w": normal(1, 60, 40)})
    x = normal(2, 5, 60)
    trainable, frozen = sj.partition(adapted)
    loss = lambda t, x: sj.with_adapters(lambda p: x @ p["w"])(sj.combine(t, frozen)).sum()
    jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable, x)
    shapes = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert (60, 40) not in shapes
    assert (40, 60) not in shapes


@pytest.mark.parametrize("value", ["raise", None, True, "ERROR"])
def test_on_materialize_is_one_of_three_words(value):
    with pytest.raises(ValueError, match='"error", "warn" or "allow"'):
        sj.with_adapters(mlp, on_materialize=value)


def test_errors_of_the_model_come_through():
    adapted = adapt({"w": normal(1, 6, 4)})
    with pytest.raises(TypeError, match="dot_general"):
        sj.with_adapters(lambda p: np.ones((2, 5), np.float32) @ p["w"])(adapted)
    with pytest.raises(ZeroDivisionError):
        sj.with_adapters(lambda p: 1 // 0)(adapted)
