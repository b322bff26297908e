"""Statistics against sums that numpy forms from inputs which the model itself returns."""

import gc
import itertools
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import subspace_jax as sj
from subspace_jax.core import PatternError, StatisticsError

from .helpers import close, normal

BATCHES = [normal(s, 5, 6) for s in range(3)]
EVERY_INPUT = ("gram", "mean")
EVERY_GRADIENT = ("gradient", "squared_gradient")


def check(found, rows, tolerance=2e-4):
    """Compares with all rows `[..., n, in]` of all batches."""
    rows = np.asarray(rows, np.float64)
    close(found.gram, rows.swapaxes(-1, -2) @ rows, tolerance)
    close(found.mean, rows.mean(-2), tolerance)
    np.testing.assert_array_equal(found.count, np.full(rows.shape[:-2], rows.shape[-2]))
    close(found.second_moment, rows.swapaxes(-1, -2) @ rows / rows.shape[-2], tolerance)
    assert {v.dtype for v in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


def capture(fn, w, batches=BATCHES, statistics=EVERY_INPUT, **kwargs):
    return sj.capture(lambda p, x: fn(p["w"], x), {"w": w}, batches, statistics=statistics, **kwargs)["w"]


STACKED = np.stack([normal(s, 6, 6) for s in (10, 11, 12)]) / 2


def layers(w, x):
    """Inputs of each layer of a tanh stack, by numpy."""
    seen = []
    for one in w:
        seen.append(x)
        x = np.tanh(x @ one)
    return np.stack(seen)


def all_layers():
    return np.concatenate([layers(STACKED, x) for x in BATCHES], axis=1)


CASES = {
    "matmul": (normal(1, 6, 4), lambda w, x: x @ w, lambda x: x),
    "transposed": (normal(1, 4, 6), lambda w, x: x @ w.T, lambda x: x),
    "weight first": (normal(1, 4, 6), lambda w, x: w @ x.T, lambda x: x),
    "jit": (normal(1, 6, 4), jax.jit(lambda w, x: x @ w), lambda x: x),
    "remat": (normal(1, 6, 4), jax.checkpoint(lambda w, x: jnp.sin(x) @ w), np.sin),
    "heads out": (normal(1, 6, 2, 4), lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), lambda x: x),
    "heads in": (normal(1, 2, 3, 4), lambda w, x: jnp.einsum("bhk,hkd->bd", x.reshape(5, 2, 3), w), lambda x: x),
    "vmap": (normal(1, 6, 4), lambda w, x: jax.vmap(lambda row: row @ w)(x), lambda x: x),
    "vector": (normal(1, 6, 4), lambda w, x: x[2] @ w, lambda x: x[2:3]),
    "used twice": (normal(1, 6, 6), lambda w, x: (x @ w, jnp.cos(x) @ w), lambda x: np.concatenate([x, np.cos(x)])),
    "used in both directions": (normal(1, 6, 4), lambda w, x: jnp.tanh(x @ w) @ w.T, lambda x: x),
    "after another product": (
        normal(1, 6, 4),
        lambda w, x: jnp.tanh(x @ normal(2, 6, 6)) @ w,
        lambda x: np.tanh(x @ normal(2, 6, 6)),
    ),
    "custom_vjp": (normal(1, 6, 4), lambda w, x: rounded(x) @ w, np.round),
    "nothing of it counts": (normal(1, 6, 4), lambda w, x: 0.0 * (x @ w), lambda x: x),
    "rows at zero output": (normal(1, 6, 4), lambda w, x: jax.nn.relu(-jnp.abs(x @ w)), lambda x: x),
}


@jax.custom_vjp
def rounded(x):
    return jnp.round(x)


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@pytest.mark.parametrize("name", CASES)
def test_inputs(name):
    w, fn, rows = CASES[name]
    check(capture(fn, w), np.concatenate([rows(x) for x in BATCHES]))


SCANS = {
    "scan": lambda w, x: lax.scan(lambda x, v: (jnp.tanh(x @ v), None), x, w)[0],
    "scan and remat": lambda w, x: lax.scan(jax.checkpoint(lambda x, v: (jnp.tanh(x @ v), None)), x, w)[0],
    "remat of scan": jax.checkpoint(lambda w, x: lax.scan(lambda x, v: (jnp.tanh(x @ v), None), x, w)[0]),
    "Python loop": lambda w, x: jnp.tanh(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) @ w[2]),
    "fori_loop": lambda w, x: lax.fori_loop(
        0, 3, lambda i, x: jnp.tanh(x @ lax.dynamic_index_in_dim(w, i, 0, False)), x
    ),
}


@pytest.mark.parametrize("name", SCANS)
def test_inputs_of_each_stacked_layer(name):
    check(capture(SCANS[name], STACKED), all_layers())


def test_inputs_of_each_expert():
    w = normal(1, 2, 3, 4)
    found = capture(lambda w, x: jnp.einsum("bek,ekd->bed", x.reshape(5, 2, 3), w), w)
    check(found, np.concatenate([x.reshape(5, 2, 3).transpose(1, 0, 2) for x in BATCHES], axis=1))


def patches(image, window, strides, padding, dilation):
    """Windows under each output pixel, row by row, by loops. Image is `[n, h, w, c]`, padding explicit."""
    image = np.pad(image, ((0, 0), *padding, (0, 0)))
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    places = itertools.product(
        range(len(image)),
        range(0, image.shape[1] - reach[0] + 1, strides[0]),
        range(0, image.shape[2] - reach[1] + 1, strides[1]),
    )
    steps = dilation
    rows = [image[n, i : i + reach[0] : steps[0], j : j + reach[1] : steps[1]].ravel() for n, i, j in places]
    return np.stack(rows)


@pytest.mark.parametrize("numbers", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CHWN", "IHWO", "NHWC")])
@pytest.mark.parametrize(
    ("strides", "padding", "dilation"),
    [((1, 1), ((0, 0), (0, 0)), (1, 1)), ((2, 1), ((1, 0), (2, 1)), (1, 1)), ((1, 2), ((1, 1), (0, 0)), (2, 1))],
)
def test_inputs_of_convolutions(numbers, strides, padding, dilation):
    kernel = {"H": 2, "W": 3, "I": 4, "O": 5}
    images = [normal(s, 2, 6, 7, 4) for s in (0, 1)]
    order = ["NHWC".index(c) for c in numbers[0]]
    found = capture(
        lambda w, x: lax.conv_general_dilated(x, w, strides, padding, rhs_dilation=dilation, dimension_numbers=numbers),
        normal(3, *(kernel[c] for c in numbers[1])),
        [x.transpose(order) for x in images],
    )
    rows = np.concatenate([patches(x, (2, 3), strides, padding, dilation) for x in images])
    # The kernel's own order of its input axes.
    inside = [c for c in numbers[1] if c != "O"]
    rows = rows.reshape(-1, 2, 3, 4).transpose(0, *(1 + "HWI".index(c) for c in inside)).reshape(len(rows), -1)
    check(found, rows)


def test_inputs_of_a_linen_transformer():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, 6)
            x = embed(tokens)
            self.sow("intermediates", "first", x)
            x = x + nn.MultiHeadDotProductAttention(2)(x)
            self.sow("intermediates", "second", x)
            x = nn.Dense(6)(x)
            return embed.attend(x)

    model = Model()
    batches = [np.array([[1, 2, 3], [4, 5, 6]]), np.array([[10, 0, 0], [1, 1, 7]])]
    params = jax.jit(model.init)(jax.random.key(0), batches[0])["params"]
    fn = lambda p, t: model.apply({"params": p}, t)
    found = sj.capture(fn, params, batches, statistics=EVERY_INPUT)
    seen = [model.apply({"params": params}, t, mutable="intermediates")[1]["intermediates"] for t in batches]
    for name, path in (("first", "MultiHeadDotProductAttention_0/query/kernel"), ("second", "Dense_0/kernel")):
        check(found[path], np.concatenate([np.reshape(s[name][0], (-1, 6)) for s in seen]))
    kernels = {"query", "key", "value", "out"}
    assert set(found) == {f"MultiHeadDotProductAttention_0/{k}/kernel" for k in kernels} | {"Dense_0/kernel"}


def loss(p, x):
    return jnp.mean(jnp.sin(jnp.tanh(x @ p["a"]) @ p["w"]) + p["b"] ** 2)


PARAMS = {"a": normal(1, 6, 5), "w": normal(2, 5, 4), "b": normal(3, 4)}


def test_gradients_are_averaged_over_batches():
    found = sj.capture(loss, PARAMS, BATCHES, statistics=EVERY_GRADIENT)
    gradients = [jax.grad(loss)(PARAMS, x) for x in BATCHES]
    assert set(found) == set(PARAMS)
    for path in PARAMS:
        each = np.stack([np.asarray(g[path], np.float64) for g in gradients])
        close(found[path].gradient, each.mean(0))
        close(found[path].squared_gradient, (each**2).mean(0))
        assert found[path].gram is None
        assert found[path].batches == 3


def test_all_statistics_at_once():
    found = sj.capture(loss, PARAMS, BATCHES, statistics=EVERY_INPUT + EVERY_GRADIENT, select="*a")["a"]
    check(sj.core.Statistics(gram=found.gram, mean=found.mean, count=found.count), np.concatenate(BATCHES))
    close(found.gradient, np.mean([jax.grad(loss)(PARAMS, x)["a"] for x in BATCHES], axis=0))


def test_gradients_through_scan_and_remat():
    scalar = lambda p, x: lax.scan(jax.checkpoint(lambda x, v: (jnp.tanh(x @ v), None)), x, p["w"])[0].sum()
    found = sj.capture(scalar, {"w": STACKED}, BATCHES, statistics=("gradient",))["w"]
    close(found.gradient, np.mean([jax.grad(scalar)({"w": STACKED}, x)["w"] for x in BATCHES], axis=0))


def test_bfloat16_model_is_summed_in_float32():
    batches = [jnp.asarray(x, jnp.bfloat16) for x in BATCHES]
    w = normal(1, 6, 4).astype(jnp.bfloat16)
    check(capture(lambda w, x: x @ w, w, batches), np.concatenate([np.asarray(x, np.float64) for x in batches]))
    # One in a thousand: in bfloat16 the sum would stop growing at 256.
    ones = [jnp.ones((100, 6), jnp.bfloat16)] * 10
    found = capture(lambda w, x: x @ w, w, ones)
    np.testing.assert_array_equal(found.gram, np.full((6, 6), 1000.0))
    gradient = sj.capture(lambda p, x: (x @ p).astype(jnp.float32).sum(), w, ones, statistics=EVERY_GRADIENT)[""]
    assert gradient.gradient.dtype == gradient.squared_gradient.dtype == jnp.float32


def test_only_what_is_selected():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["w"] + p["b"]
    assert set(sj.capture(fn, PARAMS, BATCHES)) == {"a", "w"}
    assert set(sj.capture(fn, PARAMS, BATCHES, select="w")) == {"w"}
    assert set(sj.capture(fn, PARAMS, BATCHES, select=["a", "w"])) == {"a", "w"}
    assert set(sj.capture(fn, PARAMS, BATCHES, select=lambda path, array: array.shape[0] == 5)) == {"w"}
    assert set(sj.capture(loss, PARAMS, BATCHES, statistics=("gradient",), select="b")) == {"b"}
    check(sj.capture(fn, PARAMS, BATCHES, select="a", statistics=EVERY_INPUT)["a"], np.concatenate(BATCHES))


def test_tied_embedding_counts_no_rows_of_its_output():
    fn = lambda p, t: jnp.tanh(jnp.take(p["e"], t, axis=0) @ p["w"]) @ p["e"].T
    params, tokens = {"e": normal(0, 7, 4), "w": normal(1, 4, 4)}, np.array([1, 1, 6])
    found = sj.capture(fn, params, [tokens], statistics=EVERY_INPUT)
    assert set(found) == {"w"}
    check(found["w"], params["e"][tokens])


def test_batches_are_streamed_and_the_step_compiles_once():
    alive, traces = [], []

    def batches():
        for s in range(6):
            gc.collect(1)  # what is new; all that a long session holds takes a second each time
            # No batch handed out before may still be held while the next one is made.
            alive.append(sum(b() is not None for b in references))
            batch = jnp.asarray(normal(s, 5, 6))
            references.append(weakref.ref(batch))
            yield batch
            del batch

    references = []

    def fn(p, x):
        traces.append(1)
        return x @ p

    sj.capture(fn, normal(1, 6, 4), batches())
    assert max(alive) == 0
    assert len(traces) <= 2  # roles, and the step


def test_a_step_that_the_caller_keeps_serves_further_calls_and_no_other_functions():
    traces, programs, batch = [], {}, jnp.asarray(normal(0, 5, 6))

    def make(factor):
        def fn(p, x):
            traces.append(1)
            return (factor * x) @ p["w"]

        return fn

    one, two = make(1.0), make(2.0)
    options = {"roles": sj.roles(one, {"w": normal(1, 6, 4)}, batch), "programs": programs}
    traces.clear()
    found = [sj.capture(fn, {"w": normal(1, 6, 4)}, [batch], **options) for fn in (one, one, two)]
    assert len(traces) == 2
    np.testing.assert_array_equal(found[1]["w"].gram, found[0]["w"].gram)
    np.testing.assert_allclose(found[2]["w"].gram, 4 * found[0]["w"].gram, rtol=1e-6)


def test_any_pytree_as_batch_and_a_shorter_last_one():
    fn = lambda p, batch: batch["x"] @ p["w"] * batch["n"]
    batches = [{"x": x, "n": np.float32(1)} for x in (BATCHES[0], BATCHES[1], BATCHES[2][:2])]
    found = sj.capture(fn, {"w": normal(1, 6, 4)}, batches, statistics=EVERY_INPUT)["w"]
    check(found, np.concatenate([b["x"] for b in batches]))


def test_parameters_are_left_as_they_were():
    params = jax.tree.map(jnp.asarray, PARAMS)
    sj.capture(loss, params, BATCHES, statistics=EVERY_GRADIENT)
    for path, value in PARAMS.items():
        np.testing.assert_array_equal(params[path], value)


def test_refusals():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["w"] + p["b"]
    with pytest.raises(StatisticsError, match="no batches"):
        sj.capture(fn, PARAMS, [])
    for unknown in (("grams",), (), ("gram", "hessian")):
        with pytest.raises(StatisticsError, match="choose from"):
            sj.capture(fn, PARAMS, BATCHES, statistics=unknown)
    with pytest.raises(StatisticsError, match=r"scalar loss; it returns \(5, 4\)"):
        sj.capture(fn, PARAMS, BATCHES, statistics=("gradient",))
    with pytest.raises(StatisticsError, match=r"b: .*'bias'"):
        sj.capture(fn, PARAMS, BATCHES, select="b")
    with pytest.raises(PatternError, match=r"'c' matches no leaf; nearest paths: .*'a'"):
        sj.capture(fn, PARAMS, BATCHES, select="c")
    with pytest.raises(StatisticsError, match=r"w: no input met this weight.*stop_gradient"):
        sj.capture(lambda p, x: jax.lax.stop_gradient(x @ p["w"]), {"w": normal(1, 6, 4)}, BATCHES)
    with pytest.raises(StatisticsError, match="No leaf is selected"):
        sj.capture(lambda p, x: x + p["b"], {"b": normal(1, 6)}, BATCHES)
    with pytest.raises(StatisticsError, match="Gram matrix was not captured"):
        _ = sj.capture(loss, PARAMS, BATCHES, statistics=("gradient",))["a"].second_moment
    grouped = lambda p, x: lax.conv_general_dilated(
        x, p["w"], (1,), "SAME", feature_group_count=2, dimension_numbers=("NWC", "WIO", "NWC")
    )
    with pytest.raises(StatisticsError, match=r"w: .*'conv' \(groups=2\)"):
        sj.capture(grouped, {"w": normal(1, 3, 3, 4)}, [normal(0, 2, 5, 6)], select="w")


def test_a_string_is_one_statistic():
    found = sj.capture(lambda p, x: x @ p, normal(1, 6, 4), BATCHES, statistics="gram")[""]
    assert found.gram.shape == (6, 6)
    assert found.mean is None
