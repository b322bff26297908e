"""Plain JAX functions that use a weight in every way that needs no array, against the dense model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import subspace_jax as sj
from subspace_jax.core import MaterializeError

from .helpers import adapt, close, merged, normal, same_as_dense

ROLE = sj.Role.dense
X = normal(0, 5, 6)
TOKENS = np.array([[0, 3, 6], [6, 1, 2]])

# name -> (shape of the weight, its role, function of the weight and nothing else)
DENSE = {
    "matmul": ((6, 4), None, lambda w: X @ w),
    "vector": ((6, 4), None, lambda w: X[0] @ w),
    "batched input": ((6, 4), None, lambda w: jnp.stack([X, 2 * X]) @ w),
    "transposed kernel": ((4, 6), ROLE((1,), (0,)), lambda w: X @ w.T),
    "weight first": ((6, 4), None, lambda w: w.T @ X.T),
    "weight first, rows in": ((4, 6), ROLE((1,), (0,)), lambda w: w @ X.T),
    "weight first einsum": ((6, 4), None, lambda w: jnp.einsum("df,bd->fb", w, X)),
    "einsum to batch first": ((6, 4), None, lambda w: jnp.einsum("df,bd->bf", w, X)),
    "tensordot": ((6, 2, 4), ROLE((0,), (1, 2)), lambda w: jnp.tensordot(X, w, 1)),
    "tensordot weight first": ((4, 6), ROLE((1,), (0,)), lambda w: jnp.tensordot(w, X, ((1,), (1,)))),
    "tensordot of two axes": ((2, 3, 4), ROLE((0, 1), (2,)), lambda w: jnp.tensordot(X.reshape(5, 2, 3), w, 2)),
    "heads out": ((6, 2, 4), ROLE((0,), (1, 2)), lambda w: jnp.einsum("bd,dhk->bhk", X, w)),
    "heads out, reordered": ((6, 2, 4), ROLE((0,), (1, 2)), lambda w: jnp.einsum("bd,dhk->hbk", X, w)),
    "heads in": ((2, 3, 4), ROLE((0, 1), (2,)), lambda w: jnp.einsum("bhk,hkd->bd", X.reshape(5, 2, 3), w)),
    "heads in, other order": (
        (3, 2, 4),
        ROLE((1, 0), (2,)),
        lambda w: jnp.einsum("bhk,khd->bd", X.reshape(5, 2, 3), w),
    ),
    "per head": ((2, 3, 4), ROLE((1,), (2,), (0,)), lambda w: jnp.einsum("bhk,hkd->bhd", X.reshape(5, 2, 3), w)),
    "experts summed": ((2, 3, 4), ROLE((1,), (2,), (0,)), lambda w: jnp.einsum("bhk,hkd->bd", X.reshape(5, 2, 3), w)),
    "every expert": ((2, 6, 4), ROLE((1,), (2,), (0,)), lambda w: jnp.einsum("bd,edf->ebf", X, w)),
    "stack axis last": ((6, 4, 2), ROLE((0,), (1,), (2,)), lambda w: jnp.einsum("bd,dfe->ebf", X, w)),
    "role of the other side": ((6, 4), ROLE((1,), (0,)), lambda w: X @ w),
    "part of the inputs": ((6, 2, 4), ROLE((0, 1), (2,)), lambda w: jnp.einsum("bd,dhk->bhk", X, w)),
    "inputs and outputs": ((6, 5), None, lambda w: jnp.einsum("bd,db->", X, w)),
    "swapaxes": ((4, 6), ROLE((1,), (0,)), lambda w: X @ jnp.swapaxes(w, 0, 1)),
    "twice transposed": ((6, 2, 4), ROLE((0,), (1, 2)), lambda w: jnp.einsum("bd,khd->bkh", X, w.transpose(2, 1, 0))),
    "transposed and transposed again": (
        *((6, 2, 4), ROLE((0,), (1, 2))),
        lambda w: jnp.einsum("bd,dkh->bkh", X, jnp.swapaxes(jnp.transpose(w, (1, 2, 0)), 0, 2)),
    ),
    "indexed after a transpose": (
        *((6, 4, 3), ROLE((0,), (1,), (2,))),
        lambda w: X @ jnp.moveaxis(w, 2, 0)[1] + X @ jnp.moveaxis(w, 2, 1)[:, 2],
    ),
    "empty batch": ((6, 4), None, lambda w: X[:0] @ w),
    "joined outputs": ((6, 2, 4), ROLE((0,), (1, 2)), lambda w: X @ w.reshape(6, 8)),
    "split outputs": ((6, 8), None, lambda w: jnp.einsum("bd,dhk->bhk", X, w.reshape(6, 2, 4))),
    "reshape to itself": ((6, 4), None, lambda w: X @ lax.reshape(w, (6, 4))),
    "reshape that transposes": ((4, 6), ROLE((1,), (0,)), lambda w: X @ lax.reshape(w, (6, 4), (1, 0))),
    "squeezed": ((6, 1, 4), ROLE((0,), (1, 2)), lambda w: X @ w[:, 0]),
    "squeezed first": ((1, 6, 4), ROLE((0, 1), (2,)), lambda w: X @ jnp.squeeze(w, 0)),
    "joined inputs": ((2, 3, 4), ROLE((0, 1), (2,)), lambda w: X @ w.reshape(6, 4)),
    "split inputs": ((6, 4), None, lambda w: jnp.einsum("bhk,hkd->bd", X.reshape(5, 2, 3), w.reshape(2, 3, 4))),
    "one input, split outputs": ((1, 8), None, lambda w: jnp.einsum("bd,dhk->bhk", X[:, :1], w.reshape(1, 2, 4))),
    "stack of one, joined": (
        *((1, 6, 2, 4), ROLE((1,), (2, 3), (0,))),
        lambda w: jnp.einsum("bd,edf->ebf", X, w.reshape(1, 6, 8)),
    ),
    "outputs before inputs, split": (
        *((8, 6), ROLE((1,), (0,))),
        lambda w: jnp.einsum("bd,hkd->bhk", X, w.reshape(2, 4, 6)),
    ),
    "axis of one in between": ((6, 4), None, lambda w: jnp.einsum("bd,dnf->bnf", X, w[:, None])),
    "new axis": ((6, 4), None, lambda w: jnp.einsum("bd,ndf->nbf", X, w[None])),
    "stacked, joined": (
        *((3, 6, 2, 4), ROLE((1,), (2, 3), (0,))),
        lambda w: jnp.einsum("bd,edf->ebf", X, w.reshape(3, 6, 8)),
    ),
    "stop_gradient elsewhere": ((6, 4), None, lambda w: X @ w + lax.stop_gradient(X @ w)),
    "bfloat16": ((6, 4), None, lambda w: X.astype(jnp.float32) @ w.astype(jnp.float32)),
    "precision": ((6, 4), None, lambda w: jnp.dot(X, w, precision="highest")),
    "preferred type": ((6, 4), None, lambda w: jnp.dot(X, w, preferred_element_type=jnp.float32)),
    "barrier": ((6, 4), None, lambda w: X @ lax.optimization_barrier((w, X))[0]),
    "copy": ((6, 4), None, lambda w: X @ jnp.copy(w)),
    "shared": ((6, 6), None, lambda w: jnp.tanh(X @ w) @ w),
    "shared, both sides": ((6, 6), None, lambda w: jnp.tanh(X @ w) @ w.T),
    "indexed in a Python loop": (
        *((3, 6, 6), ROLE((1,), (2,), (0,))),
        lambda w: functools.reduce(lambda x, i: jnp.tanh(x @ w[i]), range(3), X),
    ),
    "negative index": ((3, 6, 4), ROLE((1,), (2,), (0,)), lambda w: X @ w[-1]),
    "slice of the stack": ((3, 6, 4), ROLE((1,), (2,), (0,)), lambda w: jnp.einsum("bd,edf->ebf", X, w[1:])),
    "unstacked": ((3, 6, 4), ROLE((1,), (2,), (0,)), lambda w: sum(X @ one for one in w)),
    "index by an array": ((3, 6, 4), ROLE((1,), (2,), (0,)), lambda w: X @ w[jnp.asarray(1)]),
    "dynamic_index_in_dim": (
        *((3, 6, 6), ROLE((1,), (2,), (0,))),
        lambda w: lax.fori_loop(0, 1, lambda i, x: x, jnp.tanh(X @ lax.dynamic_index_in_dim(w, 2, 0, False))),
    ),
    "index in scan": (
        *((3, 6, 6), ROLE((1,), (2,), (0,))),
        lambda w: lax.scan(
            lambda x, i: (jnp.tanh(x @ lax.dynamic_index_in_dim(w, i, keepdims=False)), None), X, jnp.arange(3)
        )[0],
    ),
    "stack by several indices": (
        (3, 6, 4),
        ROLE((1,), (2,), (0,)),
        lambda w: jnp.einsum("bd,bdf->bf", X, w[jnp.array([0, 2, 1, 1, 0])]),
    ),
    "two stacked axes": ((2, 3, 6, 4), ROLE((2,), (3,), (0, 1)), lambda w: X @ w[1, 2]),
    "vmap over the stack": ((3, 6, 4), ROLE((1,), (2,), (0,)), lambda w: jax.vmap(lambda one: X @ one)(w)),
    "vmap over a middle stack": ((6, 3, 4), ROLE((0,), (2,), (1,)), lambda w: jax.vmap(lambda v: X @ v, 1, 1)(w)),
    "vmap over the input": ((6, 4), None, lambda w: jax.vmap(lambda x: x @ w)(X)),
    "lookup": ((7, 4), sj.Role.embedding(), lambda w: jnp.take(w, TOKENS, axis=0)),
    "lookup by index": ((7, 4), sj.Role.embedding(), lambda w: w[TOKENS]),
    "lookup of one": ((7, 4), sj.Role.embedding(), lambda w: w[jnp.asarray(3)]),
    "lookup, clip": ((7, 4), sj.Role.embedding(), lambda w: jnp.take(w, TOKENS + 3, axis=0, mode="clip")),
    "lookup, fill zero": ((7, 4), sj.Role.embedding(), lambda w: w.at[TOKENS + 3].get(mode="fill", fill_value=0)),
    "lookup, wrap": ((7, 4), sj.Role.embedding(), lambda w: jnp.take(w, TOKENS - 9, axis=0, mode="wrap")),
    "lookup of columns": ((4, 7), ROLE(), lambda w: jnp.take(w, TOKENS, axis=1)),
    "lookup in the transpose": ((4, 7), sj.Role("embedding", (), (1,), (0,)), lambda w: jnp.take(w.T, TOKENS, axis=0)),
    "lookup, three axes": ((7, 2, 4), sj.Role("embedding", (), (0,), (1, 2)), lambda w: jnp.take(w, TOKENS, axis=0)),
    "lookup, half": ((7, 4), sj.Role.embedding(), lambda w: jnp.take(w.astype(jnp.float32), TOKENS, axis=0)),
    "lookup and tied output": ((7, 4), sj.Role.embedding(), lambda w: jnp.tanh(jnp.take(w, TOKENS, axis=0)) @ w.T),
    "stacked lookup": (
        *((2, 7, 4), sj.Role("embedding", (0,), (1,), (2,))),
        lambda w: jnp.take(w[0], TOKENS, axis=0) + jnp.take(w[1], TOKENS, axis=0),
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_use_equals_dense_model(name):
    shape, role, fn = DENSE[name]
    adapted = adapt({"w": normal(1, *shape)}, roles=role and {"w": role})
    same_as_dense(lambda p: fn(p["w"]), adapted)


IMAGE = normal(3, 2, 9, 8, 6)
CONV = {
    "same": {"padding": "SAME"},
    "valid": {"padding": "VALID"},
    "explicit padding": {"padding": ((2, 0), (1, 3))},
    "strides": {"padding": "SAME", "window_strides": (2, 3)},
    "dilation": {"padding": "SAME", "rhs_dilation": (2, 1)},
    "transposed": {"padding": ((1, 2), (2, 1)), "lhs_dilation": (2, 2)},
    "groups": {"padding": "SAME", "feature_group_count": 3},
    "depthwise": {"padding": "SAME", "feature_group_count": 6},
    "batch groups": {"padding": "SAME", "batch_group_count": 2},
    "precision": {"padding": "SAME", "precision": "highest"},
}


@pytest.mark.parametrize("name", CONV)
def test_convolution_equals_dense_model(name):
    options = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **CONV[name]}
    groups = options.get("feature_group_count", 1)
    adapted = adapt({"w": normal(1, 3, 2, 6 // groups, 12)}, roles={"w": sj.Role.conv(4, groups)})
    same_as_dense(lambda p: lax.conv_general_dilated(IMAGE, p["w"], **options), adapted)


@pytest.mark.parametrize(
    "numbers",
    [
        *(("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "OIHW", "NCHW"), ("NCHW", "HWIO", "NHWC")),
        *(("CHWN", "IHWO", "CHWN"), ("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW"), ("NDHWC", "DHWIO", "NDHWC")),
        *(("NCDHW", "OIDHW", "NCDHW"), ("HWNC", "HIWO", "NHWC")),
    ],
)
@pytest.mark.parametrize("options", [{}, {"feature_group_count": 2}], ids=["one group", "two groups"])
def test_convolution_with_any_dimension_numbers(numbers, options):
    sizes = dict(zip("NCDHW", (2, 4, 3, 5, 4), strict=True))
    kernel = dict(zip("OIDHW", (6, 4 // options.get("feature_group_count", 1), 2, 3, 2), strict=True))
    image, shape = normal(3, *(sizes[c] for c in numbers[0])), tuple(kernel[c] for c in numbers[1])
    window = (1,) * (len(numbers[0]) - 2)

    def fn(p):
        return lax.conv_general_dilated(image, p["w"], window, "SAME", dimension_numbers=numbers, **options)

    params = {"w": normal(1, *shape)}
    roles = sj.roles(fn, params)
    out = numbers[1].index("O")
    assert roles["w"].kind == "conv"
    assert roles["w"].out_axes == (out,)
    assert roles["w"].in_axes == tuple(i for i in range(len(shape)) if i != out)
    assert roles["w"].groups == options.get("feature_group_count", 1)
    same_as_dense(fn, adapt(params, roles=roles))


def test_convolution_with_the_kernel_of_a_dense_layer():
    image = normal(3, 2, 5, 5, 6)
    adapted = adapt({"w": normal(1, 6, 4)})

    def fn(p):
        return lax.conv_general_dilated(
            image, p["w"][None, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    same_as_dense(fn, adapted)


# What cannot do without the array, with the primitive that the message names.
REFUSED = {
    "elementwise": (lambda w: X @ (w * jnp.tri(6, 4)), "mul"),
    "norm": (lambda w: jnp.linalg.norm(w), "(mul|square)"),
    "padded": (lambda w: X @ jnp.pad(w, ((0, 0), (0, 1))), "pad"),
    "columns sorted": (lambda w: X @ jnp.sort(w, axis=1), "sort"),
    "bent": (lambda w: X @ jnp.tanh(w), "tanh"),
    "matrices joined": (lambda w: jnp.ones(24) @ w.reshape(24), "reshape"),
    "flipped": (lambda w: X @ w[::-1], "rev"),
    "both operands": (lambda w: w @ w.T, "dot_general"),
    "elements gathered": (lambda w: w[jnp.array([0, 1]), jnp.array([1, 2])], "gather"),
    "filled lookup": (lambda w: w.at[jnp.array([0, 9])].get(mode="fill", fill_value=3.0), "gather"),
    "cast to integers": (lambda w: X @ w.astype(jnp.int32), "convert_element_type"),
    "branch returns it": (lambda w: X @ lax.cond(X[0, 0] > 0, lambda v: v, lambda v: v + 1, w), "add"),
    "scanned but not stacked": (lambda w: lax.scan(lambda c, row: (c, row.sum()), 0.0, w)[1], "scan over an axis"),
    "carry that changes": (lambda w: lax.fori_loop(0, 2, lambda i, v: v * 2, w), "a loop that changes it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_use_that_needs_the_array_is_refused_by_name(name):
    fn, primitive = REFUSED[name]
    adapted = adapt({"block": {"kernel": normal(1, 6, 4)}})
    model = lambda p: fn(p["block"]["kernel"])
    with pytest.raises(MaterializeError, match=f'block/kernel.*\'{primitive}.*on_materialize="allow"') as caught:
        sj.with_adapters(model)(adapted)
    assert "(6, 4)" in str(caught.value)
    with pytest.warns(UserWarning, match=f"block/kernel.*'{primitive}"):
        warned = sj.with_adapters(model, on_materialize="warn")(adapted)
    allowed = sj.with_adapters(model, on_materialize="allow")(adapted)
    expected = model(merged(adapted))
    close(allowed, expected)
    close(warned, expected)


def test_transposed_convolution_runs_but_a_flipped_kernel_is_refused():
    image, roles = normal(3, 2, 5, 5, 6), {"w": sj.Role.conv(4)}
    adapted = adapt({"w": normal(1, 3, 3, 6, 4)}, roles=roles)
    same_as_dense(lambda p: lax.conv_transpose(image, p["w"], (2, 2), "SAME"), adapted)

    def flipped(p):
        return lax.conv_transpose(image, jnp.swapaxes(p["w"], 2, 3), (2, 2), "SAME", transpose_kernel=True)

    with pytest.raises(MaterializeError, match=r"'rev'"):
        sj.with_adapters(flipped)(adapted)
    allowed = sj.with_adapters(flipped, on_materialize="allow")(adapted)
    close(allowed, flipped(merged(adapted)))


def test_out_of_range_lookup_fills_with_nan_as_the_model_does():
    adapted = adapt({"w": normal(1, 7, 4)}, roles={"w": sj.Role.embedding()})
    fn = lambda p: jnp.take(p["w"], np.array([0, 7]), axis=0)
    found = np.asarray(sj.with_adapters(fn)(adapted))
    close(found[0], fn(merged(adapted))[0])
    assert np.isnan(found[1]).all()
