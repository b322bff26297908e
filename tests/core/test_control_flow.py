"""Calls, branches and loops that a weight enters, as scanned input, carry, constant or operand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import subspace_jax as sj
from subspace_jax.core import MaterializeError

from .helpers import adapt, close, merged, normal, same_as_dense

X = normal(0, 5, 6)
STACK = sj.Role.dense((1,), (2,), (0,))
SQUARE, STACKED = (6, 6), (3, 6, 6)


def layer(x, w):
    return jnp.tanh(x @ w)


@jax.custom_jvp
def custom_jvp_layer(x, w):
    return jnp.sin(x @ w)


@custom_jvp_layer.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return jnp.sin(x @ w), jnp.cos(x @ w) * (dx @ w + x @ dw)


@jax.custom_vjp
def custom_vjp_layer(x, w):
    return jnp.sin(x @ w)


def _forward(x, w):
    return jnp.sin(x @ w), (x, w)


def _backward(residual, g):
    x, w = residual
    g = g * jnp.cos(x @ w)
    return g @ w.T, x.T @ g


custom_vjp_layer.defvjp(_forward, _backward)


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def scanned(w, body=layer, **options):
    return lax.scan(lambda x, one: (body(x, one), x.sum()), X, w, **options)


def carried(w):
    def body(carry, _):
        x, w = carry
        return (layer(x, w), w), x[0]

    return lax.scan(body, (X, w), None, length=3)[0][0]


def carried_weight_returned(w):
    (x, w), _ = lax.scan(lambda c, _: ((layer(*c), c[1]), None), (X, w), None, length=2)
    return x @ w


def weight_out_of_scan(w):
    """The scanned weight is an output of the scan as well, and used after it."""
    x, ws = lax.scan(lambda x, one: (layer(x, one), one), X, w)
    return jax.vmap(lambda one: x @ one)(ws)


def two_level(w):
    return lax.scan(lambda x, ws: (lax.scan(lambda x, one: (layer(x, one), None), x, ws)[0], None), X, w)[0]


CASES = {
    "jit": (SQUARE, None, lambda w: jax.jit(layer)(X, w)),
    "jit in jit": (SQUARE, None, lambda w: jax.jit(lambda w: jax.jit(layer)(X, w) @ w)(w)),
    "scan input": (STACKED, STACK, scanned),
    "scan input, reversed": (STACKED, STACK, lambda w: scanned(w, reverse=True)),
    "scan input, unrolled": (STACKED, STACK, lambda w: scanned(w, unroll=3)),
    "scan input, transposed": (
        *(STACKED, sj.Role.dense((2,), (1,), (0,))),
        lambda w: scanned(jnp.swapaxes(w, 1, 2)),
    ),
    "scan input, middle axis": (
        *((6, 3, 6), sj.Role.dense((0,), (2,), (1,))),
        lambda w: scanned(jnp.moveaxis(w, 1, 0)),
    ),
    "scan of scan": ((2, 3, 6, 6), sj.Role.dense((2,), (3,), (0, 1)), two_level),
    "scan constant": (SQUARE, None, lambda w: lax.scan(lambda x, _: (layer(x, w), None), X, None, length=3)[0]),
    "scan carry": (SQUARE, None, carried),
    "scan carry used after": (SQUARE, None, carried_weight_returned),
    "scan hands the stack on": (STACKED, STACK, weight_out_of_scan),
    "scan over heads": (
        *((3, 6, 2, 3), sj.Role.dense((1,), (2, 3), (0,))),
        lambda w: lax.scan(lambda x, one: (jnp.einsum("bd,dhk->bhk", x, one).reshape(5, 6), None), X, w)[0],
    ),
    "scan over convolutions": (
        *((3, 3, 6, 6), sj.Role.conv(3, stack_axes=(0,))),
        lambda w: lax.scan(
            lambda x, one: (
                lax.conv_general_dilated(x, one, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
                None,
            ),
            X[None],
            w,
        )[0],
    ),
    "map": (STACKED, STACK, lambda w: lax.map(lambda one: X @ one, w)),
    "fori_loop, index": (
        *(STACKED, STACK),
        lambda w: lax.fori_loop(0, 3, lambda i, x: layer(x, lax.dynamic_index_in_dim(w, i, 0, keepdims=False)), X),
    ),
    "cond": (SQUARE, None, lambda w: lax.cond(X[0, 0] > 0, lambda w: X @ w, lambda w: -2 * X @ w.T, w)),
    "switch": (SQUARE, None, lambda w: lax.switch(1, [lambda w: X, lambda w: layer(X, w), lambda w: X @ w], w)),
    "cond that closes over": (SQUARE, None, lambda w: lax.cond(X[0, 0] < 0, lambda: X @ w, lambda: X)),
    "remat": (SQUARE, None, lambda w: jax.checkpoint(layer)(jax.checkpoint(layer)(X, w), w)),
    "remat in scan": (STACKED, STACK, lambda w: scanned(w, jax.checkpoint(layer))),
    "remat around scan": (STACKED, STACK, jax.checkpoint(scanned)),
    "custom_jvp": (SQUARE, None, lambda w: custom_jvp_layer(X, w)),
    "custom_vjp": (SQUARE, None, lambda w: custom_vjp_layer(X, w)),
    "custom_vjp beside it": (SQUARE, None, lambda w: straight_through(5 * (X @ w)) @ w),
    "custom_jvp beside it": (SQUARE, None, lambda w: jax.nn.relu(X @ w) @ w),
    "grad inside": (SQUARE, None, lambda w: jax.grad(lambda x: layer(x, w).sum())(X)),
    "jvp inside": (SQUARE, None, lambda w: jax.jvp(lambda x: layer(x, w), (X,), (X,))),
    "vmap over scan": (
        *((2, 3, 6, 6), sj.Role.dense((2,), (3,), (0, 1))),
        lambda w: jax.vmap(lambda one: lax.scan(lambda x, v: (layer(x, v), None), X, one)[0])(w),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_model(name):
    shape, role, fn = CASES[name]
    adapted = adapt({"w": normal(1, *shape) / 2}, roles=role and {"w": role})
    # The rules of these layers are the derivatives of their bodies.
    rules = "inline" if name in ("custom_jvp", "custom_vjp") else "keep"
    same_as_dense(lambda p: fn(p["w"]), adapted, custom_rules=rules)


@pytest.mark.parametrize("where", ["body", "condition", "carry"])
def test_while_loop(where):
    """Reverse differentiation of a while loop is not defined, so values alone."""

    def fn(p):
        w = p["w"]
        if where == "carry":
            return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, layer(c[1], c[2]), c[2]), (0, X, w))[1]
        if where == "condition":
            return lax.while_loop(lambda x: jnp.abs(x @ w).max() > 0.5, lambda x: x / 2, X)
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, layer(c[1], w)), (0, X))[1]

    same_as_dense(fn, adapt({"w": normal(1, 6, 6)}), gradients=False)


def test_forward_derivative_through_a_while_loop():
    adapted = adapt({"w": normal(1, 6, 6) / 2})
    apply = sj.with_adapters(
        lambda p: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, layer(c[1], p["w"])), (0, X))[1]
    )
    trainable, frozen = sj.partition(adapted)
    direction = jax.tree.map(jnp.ones_like, trainable)
    _, found = jax.jvp(lambda t: apply(sj.combine(t, frozen)), (trainable,), (direction,))
    step = 1e-2
    moved = lambda s: merged(sj.combine(jax.tree.map(lambda v, d: v + s * d, trainable, direction), frozen))["w"]
    model = lambda w: layer(layer(X.astype(np.float64), np.asarray(w, np.float64)), np.asarray(w, np.float64))
    close(found, (np.asarray(model(moved(step))) - np.asarray(model(moved(-step)))) / (2 * step), 5e-3)


POLICIES = {
    "none": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots without batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("hidden"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_remat_with_any_policy(policy):
    body = jax.checkpoint(
        lambda x, w: checkpoint_name(layer(x, w), "hidden") @ w, policy=POLICIES[policy], prevent_cse=False
    )
    same_as_dense(lambda p: body(X, p["w"]), adapt({"w": normal(1, 6, 6)}))


def test_remat_policy_decides_what_is_saved():
    """The policy of the model's own remat governs the rewritten body: named residuals are saved, others are not."""
    adapted = adapt({"w": normal(1, 6, 6)})

    def saved(policy):
        body = jax.checkpoint(lambda x, w: jnp.sin(checkpoint_name(jnp.sin(x @ w), "hidden")).sum(), policy=policy)
        apply = sj.with_adapters(lambda p, x: body(x, p["w"]))
        _, backward = jax.vjp(lambda x: apply(adapted, x), X)
        return [v.shape for v in jax.tree.leaves(backward) if v.shape == (5, 6)]

    assert len(saved(POLICIES["names"])) == len(saved(POLICIES["nothing"])) + 1


def test_scan_keeps_one_layer_of_the_weight_at_a_time():
    """One scan over the stacked parts remains; nothing of the stacked weight's size is made."""
    adapted = adapt({"w": normal(1, 3, 6, 7)}, roles={"w": STACK})
    fn = lambda p: lax.scan(lambda x, one: (x @ one @ one.T, None), X, p["w"])[0]
    jaxpr = jax.make_jaxpr(sj.with_adapters(fn))(adapted)
    primitives = [e.primitive.name for e in jaxpr.eqns]
    assert primitives.count("scan") == 1
    shapes = {v.aval.shape for e in jaxpr.eqns for v in e.outvars if e.primitive.name != "stop_gradient"}
    assert (3, 6, 7) not in shapes


def test_restacked_output_is_the_weight_itself():
    adapted = adapt({"w": normal(1, 3, 6, 6)}, roles={"w": STACK})
    fn = lambda p: lax.scan(lambda x, one: (layer(x, one), one), X, p["w"])
    _, same = sj.with_adapters(fn)(adapted)
    assert sj.core.is_weight(same)
    np.testing.assert_array_equal(same.a, adapted["w"].a)


def test_cond_that_returns_the_weight_forms_it():
    adapted = adapt({"w": normal(1, 6, 6)})
    fn = lambda p: X @ lax.cond(X[0, 0] > 0, lambda w: w, lambda w: w.T, p["w"])
    with pytest.raises(MaterializeError, match=r"w: .*'cond'"):
        sj.with_adapters(fn)(adapted)
    close(sj.with_adapters(fn, on_materialize="allow")(adapted), fn(merged(adapted)))


def test_loop_state_beside_the_weight_keeps_its_types():
    """Integer, boolean and weakly typed carries beside a weight."""

    def fn(p):
        def body(carry, w):
            count, flag, scale, x = carry
            return (count + 1, ~flag, scale * 0.5, layer(x, w) * scale), (count, flag)

        return lax.scan(body, (0, True, 1.0, X), p["w"])

    same_as_dense(fn, adapt({"w": normal(1, 3, 6, 6)}, roles={"w": STACK}))


def test_random_keys_pass_through_loops():
    def fn(p, key):
        keys = jax.random.split(key, 3)
        return lax.scan(
            lambda x, wk: (layer(x, wk[0]) * jax.random.bernoulli(wk[1], 0.5, x.shape), None), X, (p["w"], keys)
        )[0]

    adapted = adapt({"w": normal(1, 3, 6, 6)}, roles={"w": STACK})
    same_as_dense(fn, adapted, jax.random.key(3))
    same_as_dense(fn, adapted, jax.random.PRNGKey(3))


def test_static_arguments_and_partial_of_an_inner_jit():
    @functools.partial(jax.jit, static_argnums=2, static_argnames="flip")
    def inner(x, w, times, flip=False):
        for _ in range(times):
            x = layer(x, w.T if flip else w)
        return x

    same_as_dense(lambda p: inner(X, p["w"], 2, flip=True) + inner(X, p["w"], 1), adapt({"w": normal(1, 6, 6)}))
