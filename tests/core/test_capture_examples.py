"""Scaling of examples and masks in `capture`, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import subspace_jax as sj
from subspace_jax.core import StatisticsError

from .helpers import close, normal

# Two batches of three sequences of four tokens, each sequence of its own size.
SEQUENCES = [normal(s, 3, 4, 6) * np.array([1.0, 20.0, 0.05], np.float32)[:, None, None] for s in (0, 1)]
MASKS = [np.arange(4) < np.array(lengths)[:, None] for lengths in ([4, 2, 1], [3, 4, 0])]


def scaled(sequence, how):
    """Rows `[n, in]` of one sequence as the authors divide them."""
    sequence = np.asarray(sequence, np.float64).reshape(-1, sequence.shape[-1])
    return sequence / (np.abs(sequence).max() if how == "max_abs" else abs(sequence.max()))


def capture(fn, w, batches, **kwargs):
    return sj.capture(lambda p, x: fn(p["w"], x), {"w": w}, batches, statistics=("gram", "mean"), **kwargs)["w"]


def check(found, rows, examples):
    rows = np.asarray(rows, np.float64)
    close(found.gram, rows.swapaxes(-1, -2) @ rows)
    close(found.mean, rows.mean(-2))
    np.testing.assert_array_equal(found.count, np.full(rows.shape[:-2], rows.shape[-2]))
    np.testing.assert_array_equal(found.examples, np.full(rows.shape[:-2], examples))


def all_scaled(how, sequences=SEQUENCES):
    return np.concatenate([scaled(s, how) for batch in sequences for s in batch])


@pytest.mark.parametrize("how", ["max_abs", "signed_max"])
@pytest.mark.parametrize(
    ("w", "fn"),
    [
        (normal(1, 6, 5), lambda w, x: x @ w),
        (normal(1, 6, 5), lambda w, x: jax.vmap(lambda one: one @ w)(x)),
        (normal(1, 6, 5), jax.jit(jax.checkpoint(lambda w, x: jnp.cos(x @ w)))),
        (normal(1, 5, 6), lambda w, x: jnp.einsum("oi,bti->tbo", w, x)),
        (normal(1, 2, 3, 5), lambda w, x: jnp.einsum("bthk,hkd->btd", x.reshape(3, 4, 2, 3), w)),
    ],
    ids=["matmul", "vmap", "jit", "weight first", "heads in"],
)
def test_every_sequence_is_scaled_by_its_own_largest_entry(how, w, fn):
    check(capture(fn, w, SEQUENCES, scale_examples=how), all_scaled(how), 6)


def test_one_sequence_at_a_time_is_the_same_as_many():
    one_by_one = [batch[i : i + 1] for batch in SEQUENCES[::-1] for i in range(3)]
    fn = lambda w, x: x @ w
    one, other = (capture(fn, normal(1, 6, 5), b, scale_examples="max_abs") for b in (one_by_one, SEQUENCES))
    close(one.gram, other.gram)
    np.testing.assert_array_equal(one.examples, other.examples)


def test_halves_add_up_to_the_whole():
    fn = lambda w, x: x @ w
    whole = capture(fn, normal(1, 6, 5), SEQUENCES, scale_examples="max_abs")
    halves = [capture(fn, normal(1, 6, 5), [b], scale_examples="max_abs") for b in SEQUENCES]
    close(sum(h.gram for h in halves), whole.gram)
    assert sum(h.examples for h in halves) == whole.examples


def test_examples_of_each_stacked_layer():
    w = np.stack([normal(s, 6, 6) for s in (10, 11)])
    fn = lambda w, x: lax.scan(lambda x, v: (jnp.tanh(x @ v), None), x, w)[0]
    second = [np.tanh(batch @ w[0]) for batch in SEQUENCES]
    expected = np.stack([all_scaled("max_abs"), all_scaled("max_abs", second)])
    check(capture(fn, w, SEQUENCES, scale_examples="max_abs"), expected, 6)


def test_examples_of_each_expert():
    x = normal(0, 5, 2, 3)
    found = capture(lambda w, x: jnp.einsum("bek,ekd->bed", x, w), normal(1, 2, 3, 4), [x], scale_examples="max_abs")
    check(found, (x / np.abs(x).max(axis=-1, keepdims=True)).transpose(1, 0, 2), 5)


@pytest.mark.parametrize("numbers", [("NHWC", "HWIO", "NHWC"), ("NCHW", "HWIO", "CNHW")])
def test_examples_of_a_convolution_are_images(numbers):
    images = normal(0, 3, 5, 4, 2) * np.array([1.0, 10.0, 0.1], np.float32)[:, None, None, None]
    fn = lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=numbers)
    batch = images.transpose(["NHWC".index(c) for c in numbers[0]])
    found = capture(fn, normal(1, 2, 2, 2, 5), [batch], scale_examples="max_abs")
    windows = np.lib.stride_tricks.sliding_window_view(images, (2, 2), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    check(found, np.concatenate([scaled(one.reshape(-1, 8), "max_abs") for one in windows]), 3)


def test_without_scaling_examples_are_only_counted():
    found = capture(lambda w, x: x @ w, normal(1, 6, 5), SEQUENCES)
    check(found, np.concatenate(SEQUENCES).reshape(-1, 6), 6)
    row = capture(lambda w, x: x @ w, normal(1, 6, 5), [SEQUENCES[0][0, 0]], scale_examples="max_abs")
    check(row, scaled(SEQUENCES[0][0, :1], "max_abs"), 1)


@pytest.mark.parametrize("how", [None, "max_abs", "signed_max"])
def test_masked_rows_are_not_there(how):
    batches = [{"x": x, "mask": m} for x, m in zip(SEQUENCES, MASKS, strict=True)]
    rows = [
        one[kept] if how is None else scaled(one[kept], how)
        for x, m in zip(SEQUENCES, MASKS, strict=True)
        for one, kept in zip(x, m, strict=True)
        if kept.any()
    ]
    for fn in (lambda w, b: b["x"] @ w, lambda w, b: b["x"][:, :, None] @ w):
        found = capture(fn, normal(1, 6, 5), batches, scale_examples=how, mask=lambda b: b["mask"])
        check(found, np.concatenate(rows), 5)


def test_mask_of_joined_and_of_pooled_rows():
    x, m = SEQUENCES[1], MASKS[1]
    joined = capture(lambda w, x: x.reshape(-1, 6) @ w, normal(1, 6, 5), [x], mask=lambda _: jnp.asarray(m))
    check(joined, x[m], 7)
    pooled = capture(lambda w, x: x[:, 0] @ w, normal(1, 6, 5), [x], mask=lambda _: jnp.asarray(m))
    check(pooled, x[:2, 0], 2)
    examples = capture(lambda w, x: x @ w, normal(1, 6, 5), [x], mask=lambda _: jnp.array([True, False, True]))
    check(examples, x[[0, 2]].reshape(-1, 6), 2)


def test_examples_of_zeros_and_of_negative_entries():
    fn, w = lambda w, x: x @ w, normal(1, 6, 5)
    x = np.concatenate([SEQUENCES[0], np.zeros((1, 4, 6), np.float32)])
    for how in ("max_abs", "signed_max"):
        rows = np.concatenate([all_scaled(how, [SEQUENCES[0]]), np.zeros((4, 6))])
        check(capture(fn, w, [x], scale_examples=how), rows, 4)
    negative = -np.abs(SEQUENCES[0]) - 0.01
    check(capture(fn, w, [negative], scale_examples="signed_max"), all_scaled("signed_max", [negative]), 3)
    with pytest.raises(StatisticsError, match=r"w: the gram of the inputs holds NaN.*signed_max"):
        capture(fn, w, [np.minimum(SEQUENCES[0], 0)], scale_examples="signed_max")


def test_bfloat16_inputs_are_scaled_in_float32():
    x = jnp.asarray(SEQUENCES[0], jnp.bfloat16)
    w = normal(1, 6, 5).astype(jnp.bfloat16)
    found = capture(lambda w, x: x @ w, w, [x], scale_examples="max_abs")
    check(found, all_scaled("max_abs", [np.asarray(x, np.float32)]), 3)


def test_scaling_leaves_gradients_alone():
    loss = lambda p, x: jnp.mean(jnp.sin(jnp.tanh(x @ p["a"]) @ p["w"]))
    params = {"a": normal(1, 6, 5), "w": normal(2, 5, 4)}
    names = ("gram", "gradient")
    found = sj.capture(
        loss, params, SEQUENCES, statistics=names, scale_examples="max_abs", mask=lambda x: x[..., 0] > 0
    )
    for path in params:
        close(found[path].gradient, np.mean([jax.grad(loss)(params, x)[path] for x in SEQUENCES], axis=0))


def test_refusals():
    fn, w = lambda w, x: x @ w, normal(1, 6, 5)
    with pytest.raises(StatisticsError, match="scale_examples='max'"):
        capture(fn, w, SEQUENCES, scale_examples="max")
    with pytest.raises(StatisticsError, match="about input statistics"):
        sj.capture(lambda p, x: jnp.sum(x @ p), w, SEQUENCES, statistics="gradient", scale_examples="max_abs")
    with pytest.raises(StatisticsError, match=r"mask has shape \(2, 4\), but an input has rows \(3, 4\)"):
        capture(fn, w, SEQUENCES, mask=lambda _: jnp.ones((2, 4)))
    with pytest.raises(StatisticsError, match="w: the gram of the inputs holds NaN"):
        capture(fn, w, [np.full((2, 3, 6), np.inf, np.float32)])
