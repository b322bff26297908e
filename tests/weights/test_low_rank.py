import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import subspace_jax as sj
from subspace_jax.weights import LowRank, quantize_nf4
from tests.tolerances import tolerance


def make(shape, rank, *, scale=1.5, seed=0, role=None, dtype=jnp.float32, **options):
    rng = np.random.default_rng(seed)
    role = role or sj.Role.dense()
    stack, (inputs, outputs) = role.stack_shape(shape), role.sizes(shape)
    return LowRank(
        base=jnp.asarray(rng.normal(size=shape), dtype),
        a=jnp.asarray(rng.normal(size=(*stack, inputs, rank)), jnp.float32),
        b=jnp.asarray(rng.normal(size=(*stack, rank, outputs)), jnp.float32),
        scale=scale,
        role=role,
        dtype=jnp.dtype(dtype),
        trainable=("a", "b"),
        **options,
    )


def dense(w):
    """The array in float64, by NumPy."""
    return np.asarray(w.base, np.float64) + w.scale * np.asarray(w.a, np.float64) @ np.asarray(w.b, np.float64)


def test_materialize_is_the_base_plus_the_scaled_product():
    w = make((9, 7), 3)
    np.testing.assert_allclose(w.materialize(), dense(w), rtol=1e-5, atol=1e-5)
    assert w.rank == 3


def test_a_bfloat16_base_is_added_to_in_float32():
    """A product far below the base's last place survives where the caller asks for float32."""
    w = make((16, 16), 2, dtype=jnp.bfloat16)
    w = dataclasses.replace(w, a=w.a * 1e-2, b=w.b * 1e-2)
    np.testing.assert_allclose(w.materialize(jnp.float32), dense(w), rtol=tolerance(), atol=tolerance(size=4))
    np.testing.assert_array_equal(w.materialize(), jnp.asarray(dense(w), jnp.float32).astype(jnp.bfloat16))


@pytest.mark.parametrize("model", [lambda w, x: x @ w, lambda w, x: jnp.einsum("io,bi->ob", w, x)])
def test_contract_is_the_numpy_product(model):
    w, x = make((9, 7), 3), np.random.default_rng(1).normal(size=(5, 9))
    expected = x @ dense(w)
    found = sj.with_adapters(model)(w, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found if found.shape == expected.shape else found.T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.optimized
def test_no_array_of_the_weights_shape_is_computed_in_a_step():
    """Neither the product of the factors nor the gradient of the base."""
    w, x = make((64, 48), 4), jnp.ones((8, 64))
    trainable, frozen = sj.partition(w)

    def loss(trainable):
        return jnp.sum(sj.with_adapters(lambda w, x: x @ w)(sj.combine(trainable, frozen), x) ** 2)

    program = jax.jit(jax.grad(loss)).lower(trainable).compile().as_text()
    made = [line for line in program.splitlines() if " = f32[64,48]" in line and "parameter(" not in line]
    assert not [line for line in made if "constant(" not in line and "copy(" not in line], made


@pytest.mark.parametrize(
    ("strides", "padding", "dilation"),
    list(itertools.product([(1, 1), (2, 3)], ["SAME", "VALID", ((2, 0), (1, 3))], [(1, 1), (2, 3)])),
)
def test_factored_convolution_is_the_convolution_with_the_merged_kernel(strides, padding, dilation):
    def model(kernel, x):
        return lax.conv_general_dilated(
            x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    w = make((3, 2, 4, 5), 2, role=sj.Role.conv())
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 11, 12, 4)), jnp.float32)
    kernel = np.asarray(w.base) + w.scale * np.einsum(
        "hwiq,qo->hwio", np.asarray(w.a).reshape(3, 2, 4, 2), np.asarray(w.b)
    )
    np.testing.assert_allclose(w.materialize(), kernel, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sj.with_adapters(model)(w, x), model(jnp.asarray(kernel), x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "role"),
    [
        ((9, 7), sj.Role.dense()),
        ((3, 9, 7), sj.Role.dense((1,), (2,), (0,))),
        ((4, 3, 5), sj.Role.dense((0, 1), (2,))),
        ((4, 3, 5), sj.Role.dense((2,), (0, 1))),
        ((3, 2, 4, 5), sj.Role.conv()),
    ],
)
def test_squared_norms_are_those_of_the_materialized_columns(shape, role):
    w = make(shape, 2, role=role)
    expected = np.sum(np.asarray(role.matrix(w.materialize()), np.float64) ** 2, axis=-2)
    np.testing.assert_allclose(w.squared_norms(), expected, rtol=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.2, 1e-2, 1e-3, 1e-4, 0.0])
@pytest.mark.parametrize("stack", [(), (2,)])
def test_squared_norms_where_base_and_product_cancel(share, stack):
    """Expanded squares alone are off by 6e-4, 6e-2 and 1 at shares of 1e-2, 1e-3 and 1e-4."""
    rng, inputs, outputs, rank = np.random.default_rng(0), 64, 7, 8
    a, b, rest = (rng.normal(size=(*stack, *s)) for s in ((inputs, rank), (rank, outputs), (inputs, outputs)))
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    role = sj.Role.dense((len(stack),), (len(stack) + 1,), tuple(range(len(stack))))
    w = make((*stack, inputs, outputs), rank, role=role)
    product = w.scale * a.astype(np.float64) @ b
    base = np.asarray(share * rest * np.linalg.norm(product) / np.linalg.norm(rest) - product, np.float32)
    w = dataclasses.replace(w, a=jnp.asarray(a), b=jnp.asarray(b), base=jnp.asarray(base))
    column = np.linalg.norm(base.astype(np.float64) + product, axis=-2)
    # What rounding does to the sum itself: one part in 2^24 of every entry of what is added.
    room = tolerance("float32", norm=np.linalg.norm(product, axis=-2).max())
    for norms in (w.squared_norms(), jax.jit(lambda w: w.squared_norms())(w)):
        np.testing.assert_allclose(np.sqrt(np.asarray(norms, np.float64)), column, rtol=0, atol=room)
        assert (np.asarray(norms) >= 0).all()
    if share < 1e-2:
        return
    found = jax.grad(lambda w: jnp.sum(jnp.sqrt(w.squared_norms())))(w).b
    expected = w.scale * np.swapaxes(a.astype(np.float64), -1, -2) @ ((base + product) / column[..., None, :])
    np.testing.assert_allclose(found, expected, atol=tolerance("float32", inputs, np.abs(expected).max()) / share)


def test_the_function_does_not_depend_on_the_gauge_of_the_factors():
    w, x = make((9, 7), 3), jnp.asarray(np.random.default_rng(1).normal(size=(5, 9)), jnp.float32)
    turn = np.random.default_rng(2).normal(size=(3, 3)) + 3 * np.eye(3)
    other = dataclasses.replace(w, a=w.a @ jnp.asarray(turn, jnp.float32), b=jnp.asarray(np.linalg.solve(turn, w.b)))
    apply = sj.with_adapters(lambda w, x: x @ w)
    np.testing.assert_allclose(apply(w, x), apply(other, x), rtol=1e-3, atol=1e-3)


def test_the_difference_to_the_base_has_the_rank():
    w = make((9, 7), 3)
    assert np.linalg.matrix_rank(np.asarray(w.materialize() - w.base), tol=1e-4) == 3


def test_a_weight_may_be_the_base():
    w = make((16, 8), 2)
    base = quantize_nf4(w.base)
    over = dataclasses.replace(w, base=base)
    expected = np.asarray(base.materialize(), np.float64) + w.scale * np.asarray(w.a, np.float64) @ np.asarray(w.b)
    np.testing.assert_allclose(over.materialize(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        sj.with_adapters(lambda w, x: x @ w)(over, jnp.ones((2, 16))), np.ones((2, 16)) @ expected, rtol=1e-4, atol=1e-4
    )


class TestDropout:
    apply = staticmethod(sj.with_adapters(lambda tree, x: x @ tree["w"]))

    def test_the_mean_over_keys_is_the_output_without_dropout(self):
        tree, x = {"w": make((9, 7), 3, dropout=0.4)}, jnp.ones((2, 9))
        keys = jax.random.split(jax.random.key(0), 4000)
        dropped = jax.jit(jax.vmap(lambda key: self.apply(sj.with_dropout(tree, key), x)))(keys)
        error = np.asarray(jnp.std(dropped, axis=0)) / np.sqrt(len(keys))
        assert (error > 0).all()
        assert (np.abs(np.asarray(dropped.mean(0) - self.apply(tree, x))) < 5 * error).all()

    def test_kept_inputs_are_scaled_up_and_others_are_zero(self):
        identity = dataclasses.replace(
            make((9, 9), 9, dropout=0.25, scale=1.0), base=jnp.zeros((9, 9)), a=jnp.eye(9), b=jnp.eye(9)
        )
        seen = self.apply(sj.with_dropout({"w": identity}, jax.random.key(1)), jnp.ones((200, 9)))
        values, counts = np.unique(np.asarray(seen).round(5), return_counts=True)
        np.testing.assert_allclose(values, [0.0, 1 / 0.75], rtol=1e-5)
        assert abs(counts[0] / counts.sum() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 1800)

    def test_the_base_sees_every_input(self):
        w = make((9, 7), 3, dropout=0.9)
        tree = {"w": dataclasses.replace(w, b=jnp.zeros_like(w.b))}
        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 9)), jnp.float32)
        np.testing.assert_array_equal(self.apply(sj.with_dropout(tree, jax.random.key(2)), x), self.apply(tree, x))

    def test_masks_differ_between_weights_steps_and_uses(self):
        identity = dataclasses.replace(
            make((32, 32), 32, dropout=0.5, scale=1.0), base=jnp.zeros((32, 32)), a=jnp.eye(32), b=jnp.eye(32)
        )
        tree, x = {"first": identity, "second": identity}, jnp.ones((4, 32))

        def model(tree, x):
            return x @ tree["first"], x @ tree["second"], x @ tree["first"]

        run = sj.with_adapters(model)
        seen = [np.asarray(y) for k in (0, 1) for y in run(sj.with_dropout(tree, jax.random.key(k)), x)]
        assert all((a != b).any() for a, b in itertools.combinations(seen, 2))
        again = run(sj.with_dropout(tree, jax.random.key(0)), x)
        np.testing.assert_array_equal(again[0], seen[0])

    def test_masks_differ_between_the_layers_of_a_stack(self):
        one = dataclasses.replace(
            make((3, 32, 32), 32, dropout=0.5, scale=1.0, role=sj.Role.dense((1,), (2,), (0,))),
            base=jnp.zeros((3, 32, 32)),
            a=jnp.tile(jnp.eye(32), (3, 1, 1)),
            b=jnp.tile(jnp.eye(32), (3, 1, 1)),
        )

        def model(tree, x):
            return lax.scan(lambda _, w: (None, x @ w), None, tree["w"])[1]

        seen = np.asarray(sj.with_adapters(model)(sj.with_dropout({"w": one}, jax.random.key(0)), jnp.ones((4, 32))))
        assert all((a != b).any() for a, b in itertools.combinations(seen, 2))
