"""SNELL against loops of numpy: the kernel matrix, the competition, what is differentiated, and what is kept."""

from __future__ import annotations

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.spatial.distance import cdist

import subspace_jax as sj
from subspace_jax.core import RankError
from tests.tolerances import tolerance

snell = sj.methods.snell


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def adapt(w, rank=4, seed=0, **options):
    options = {"sparsity": 0.5, "dropout": 0.0, "drop_path": 0.0, **options}
    return sj.adapt({"w": jnp.asarray(w)}, {"w": snell.snell(rank, **options)}, key=jax.random.key(seed))


def distances(a, b):
    """The kernel by a triple loop of Euclidean distances."""
    found = np.zeros((a.shape[1], b.shape[1]))
    for p, i, j in itertools.product(range(len(a)), range(a.shape[1]), range(b.shape[1])):
        found[i, j] += 0.1 * (-1) ** p * np.linalg.norm(a[p, i] - b[p, j])
    return found


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_the_kernel_is_a_signed_sum_of_distances(pieces):
    a, b = draw((pieces, 5, 6 // pieces)), draw((pieces, 4, 6 // pieces), 1)
    with jax.enable_x64(True):
        found = snell.pieces_sum(jnp.asarray(a, jnp.float64), jnp.asarray(b, jnp.float64))
        np.testing.assert_allclose(found, distances(a, b), atol=1e-10)
    expected = sum(0.1 * (-1) ** p * cdist(a[p], b[p]) for p in range(pieces))
    np.testing.assert_allclose(snell.pieces_sum(jnp.float32(a), jnp.float32(b)), expected, atol=1e-5)


def test_symmetries_of_the_kernel():
    a, b = draw((2, 5, 3)), draw((2, 4, 3), 1)
    kernel = lambda a, b: np.asarray(snell.pieces_sum(jnp.float32(a), jnp.float32(b)))
    turn = np.linalg.qr(draw((3, 3), 2))[0]
    expected = kernel(a, b)
    shift = draw((2, 1, 3), 3)
    for other in (kernel(a + shift, b + shift), kernel(a @ turn, b @ turn), -kernel(a[::-1], b[::-1])):
        np.testing.assert_allclose(other, expected, atol=1e-5)
    np.testing.assert_allclose(kernel(3 * a, 3 * b), 3 * expected, atol=1e-5)


def test_other_kernels_are_their_equations():
    a, b = draw((2, 5, 2)), draw((2, 4, 2), 1)
    rows, others = np.concatenate(a, axis=-1), np.concatenate(b, axis=-1)
    products, squares = rows @ others.T, cdist(rows, others) ** 2
    scalars = {"alpha": jnp.float32(0.7), "beta": jnp.float32(0.3), "gamma": jnp.float32(-0.2)}
    expected = {
        "linear": products,
        "sigmoid": 0.7 / (1 + np.exp(-0.3 * products)) - 0.2,
        "rbf": 0.7 * np.exp(-0.3 * squares) - 0.2,
        "distance": distances(a, b),
    }
    for name, matrix in expected.items():
        found = snell.kernel_matrix(name, jnp.float32(a), jnp.float32(b), scalars)
        np.testing.assert_allclose(found, matrix, atol=1e-5)
    weight = adapt(np.zeros((5, 4)), kernel="rbf")["w"]
    assert [float(getattr(weight, n)) for n in ("alpha", "beta", "gamma")] == [1.0, 1.0, 0.0]
    assert set(weight.trainable) == {"a", "b", "alpha", "beta", "gamma"}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.9, 1.0])
def test_the_competition_is_that_of_order_statistics(share):
    d = draw((10, 10)).astype(np.float32)
    magnitudes = np.sort(np.abs(d).ravel())
    soft = snell.compete(jnp.asarray(d), jnp.asarray(snell.threshold_order(share, 100, "soft")), "soft")
    order = int(np.ceil(share * 100 - 1e-6))
    limit = np.partition(magnitudes, order - 1)[order - 1] if order else 0.0
    np.testing.assert_allclose(soft, d * np.maximum(np.abs(d) - limit, 0), rtol=1e-6)
    hard = snell.compete(jnp.asarray(d), jnp.asarray(snell.threshold_order(share, 100, "hard")), "hard")
    quantile = np.quantile(np.abs(d).astype(np.float64), share)
    np.testing.assert_allclose(hard, np.where(np.abs(d) > quantile, d * np.abs(d), 0), rtol=1e-6)
    counts = [int((np.asarray(v) != 0).sum()) for v in (soft, hard)]
    assert counts == [100 - order, 100 - 1 - int(np.floor(share * 99 + 1e-9))]


def test_whole_numbers_of_entries_are_counted_exactly():
    """0.55 times 100 is above 55 in floats."""
    for share, size in itertools.product(np.arange(0, 101) / 100, (100, 1000, 4096 * 1024)):
        entries = round(share * size, 6)
        assert snell.threshold_order(share, size, "soft") == int(np.ceil(entries))
        if entries == int(entries):
            left = size - snell.threshold_order(share, size, "hard")
            assert abs(left - (size - entries)) <= 1


def test_equal_magnitudes_leave_no_more_than_the_share():
    d = jnp.asarray([[1.0, 1.0], [-1.0, 2.0]])
    assert snell.compete(d, jnp.asarray(2), "hard").tolist() == [[0.0, 0.0], [-0.0, 4.0]]
    assert not np.asarray(snell.compete(jnp.ones((3, 3)), jnp.asarray(5), "soft")).any()


@pytest.mark.parametrize("rule", ["soft", "hard"])
def test_the_magnitude_is_held_fixed_in_differentiation(rule):
    d, g = draw((6, 5)).astype(np.float32), draw((6, 5), 1).astype(np.float32)
    order = 12
    found = jax.jit(jax.grad(lambda d: jnp.sum(g * snell.compete(d, jnp.asarray(order), rule))))(jnp.asarray(d))
    limit = np.sort(np.abs(d).ravel())[order - 1]
    factor = np.maximum(np.abs(d) - limit, 0) if rule == "soft" else np.where(np.abs(d) > limit, np.abs(d), 0)
    np.testing.assert_allclose(found, g * factor, rtol=1e-5, atol=1e-7)


def test_survivors_keep_their_sign_and_grow_with_the_kernel():
    weight = adapt(np.zeros((8, 6)))["w"]
    d, added = (np.asarray(v) for v in (weight.matrix(weight.parts()), weight.addition()))
    kept = added != 0
    assert (np.sign(added[kept]) == np.sign(d[kept])).all()
    order = np.argsort(np.abs(d[kept]))
    assert (np.diff(np.abs(added[kept])[order]) > 0).all()
    doubled = dataclasses.replace(weight, a=2 * weight.a, b=2 * weight.b)
    np.testing.assert_allclose(doubled.addition(), 4 * added, rtol=1e-4, atol=1e-9)


def test_rank_before_the_competition_is_that_of_the_array():
    for size, rank in ((96, 8), (40, 4)):
        shape = (size, size if size > 50 else 30)
        spectrum = {}
        for kernel in ("distance", "linear"):
            weight = adapt(np.zeros(shape), rank, kernel=kernel)["w"]
            parts = {n: np.asarray(draw(v.shape, i)) for i, (n, v) in enumerate(weight.parts().items()) if n != "order"}
            with jax.enable_x64(True):
                d = snell.kernel_matrix(kernel, *(jnp.asarray(parts[n], jnp.float64) for n in ("a", "b")), {})
                values = np.linalg.svd(np.asarray(d), compute_uv=False)
            spectrum[kernel] = int((values > 1e-6 * values[0]).sum())
        assert spectrum == {"distance": min(shape), "linear": rank}


def test_no_sparsity_adds_the_kernel_itself():
    weight = adapt(np.zeros((8, 6)), sparsity=0.0)["w"]
    np.testing.assert_allclose(
        weight.materialize(), distances(*(np.asarray(v) for v in (weight.a, weight.b))), atol=1e-6
    )


def test_start_has_the_published_size():
    weight = adapt(jnp.zeros((768, 768)), 32, sparsity=0.5)["w"]
    d = np.asarray(weight.matrix(weight.parts()))
    assert d.std() == pytest.approx(6.2e-4, rel=0.05)
    assert (d * np.abs(d)).std() == pytest.approx(6.7e-7, rel=0.1)
    for factor, size in ((weight.a, 768), (weight.b, 768)):
        assert float(jnp.abs(factor).max()) == pytest.approx(1 / np.sqrt(size * 16), rel=0.01)


def test_published_count():
    """ViT-B/16, all linear layers of 12 blocks: 165,888 values per unit of rank."""
    shapes = {"q": (768, 768), "k": (768, 768), "v": (768, 768), "o": (768, 768), "i": (768, 3072), "f": (3072, 768)}
    params = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    make = lambda p: sj.adapt(p, {"*": snell.snell(8, sparsity=0.9)}, key=jax.random.key(0))
    trainable, _ = sj.partition(jax.eval_shape(make, params))
    assert 12 * sum(v.size for v in jax.tree.leaves(trainable)) == 165_888 * 8


def test_gradients_are_those_of_a_formed_array_and_finite_where_rows_are_equal():
    w, x, target = (jnp.asarray(draw(s, i), jnp.float32) for i, s in enumerate(((6, 5), (7, 6), (7, 5))))
    adapted = adapt(w, sparsity=0.3)
    weight = adapted["w"]
    same = dataclasses.replace(weight, a=weight.a.at[:, 0].set(weight.b[:, 0]))
    run = sj.with_adapters(lambda p: jnp.mean((x @ p["w"] - target) ** 2))
    slope = jax.jit(jax.grad(lambda t, f: run(sj.combine(t, f))))

    @jax.jit
    @jax.grad
    def slope_of_formed(parts, order):
        matrix = snell.pieces_sum(parts["a"], parts["b"])
        return jnp.mean((x @ (w + snell.compete(matrix, order, "soft")) - target) ** 2)

    for one in (weight, same):
        ours = slope(*sj.partition({"w": one}))
        expected = slope_of_formed({"a": one.a, "b": one.b}, one.order)
        for name, gradient in expected.items():
            assert np.isfinite(np.asarray(gradient)).all()
            np.testing.assert_allclose(getattr(ours["w"], name), gradient, rtol=1e-4, atol=1e-7)


def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward_pass():
    w = jnp.zeros((64, 96))
    adapted = adapt(w, 4)
    trainable, frozen = sj.partition(adapted)
    run = sj.with_adapters(lambda p, x: jnp.tanh(x @ p["w"]))
    x = jnp.ones((3, 64))
    _, pull = jax.vjp(lambda t: run(sj.combine(t, frozen), x), trainable)
    kept = [v for v in jax.tree.leaves(pull) if hasattr(v, "shape") and v.shape == (64, 96)]
    assert len({v.unsafe_buffer_pointer() for v in kept}) <= 1, "the frozen array itself, and nothing like it"
    state = optax.adam(1e-3).init(trainable)
    assert max(v.size for v in jax.tree.leaves((trainable, state))) == 4 * 96


def test_layers_compete_for_themselves_and_another_sparsity_compiles_nothing():
    w = jnp.asarray(draw((3, 8, 6)), jnp.float32)
    role = {"w": sj.Role.dense((1,), (2,), (0,))}
    method = snell.snell(4, sparsity=0.75)
    adapted = sj.adapt({"w": w}, {"w": method}, key=jax.random.key(0), roles=role)
    added = np.asarray(sj.merge(adapted)["w"] - w) != 0
    np.testing.assert_array_equal(added.sum(axis=(1, 2)), [12, 12, 12])
    apply = jax.jit(
        sj.with_adapters(lambda p, x: jax.lax.scan(lambda h, k: (h @ k @ jnp.ones((6, 8)), None), x, p["w"])[0])
    )
    x = jnp.ones((2, 8))
    apply(adapted, x)
    other = dataclasses.replace(adapted["w"], order=jnp.asarray([0, 24, 48], jnp.int32))
    y = apply({"w": other}, x)
    assert apply._cache_size() == 1
    np.testing.assert_allclose(y, apply({"w": other.materialize()}, x), rtol=1e-4)


def test_entries_are_written_out_and_dropout_leaves_the_mean():
    w = jnp.asarray(draw((8, 6)), jnp.float32)
    adapted = adapt(w, 4, sparsity=0.75, drop_path=0.5)
    adapted["w"] = dataclasses.replace(adapted["w"], a=20 * adapted["w"].a, b=20 * adapted["w"].b)
    written = snell.to_entries(adapted)
    assert written["w"].values.shape == (12,)
    np.testing.assert_allclose(sj.merge(written)["w"], sj.merge(adapted)["w"], rtol=tolerance(), atol=tolerance())
    run = jax.jit(sj.with_adapters(lambda p, x: x @ p["w"]))
    x = jnp.asarray(np.repeat(draw((1, 8), 4), 2000, axis=0), jnp.float32)
    base, full = x[:1] @ w, run(adapted, x)[:1]
    rows = run(sj.with_dropout(adapted, jax.random.key(1)), x)
    left = np.abs(np.asarray(rows - base)).max(axis=-1) < 1e-5
    assert abs(left.mean() - 0.5) < 0.05
    np.testing.assert_allclose(
        np.asarray(rows)[~left], np.repeat(base + 2 * (full - base), (~left).sum(), 0), rtol=1e-3
    )


def test_a_linen_model_learns():
    model = nn.Dense(5)
    x, y = jnp.asarray(draw((16, 6)), jnp.float32), jnp.asarray(draw((16, 5), 1), jnp.float32)
    params = model.init(jax.random.key(0), x)["params"]
    method = snell.snell(4, sparsity=0.3, dropout=0.0, drop_path=0.0)
    adapted = sj.adapt(params, {"kernel": method}, key=jax.random.key(1))
    loss = lambda t, _: jnp.mean((sj.with_adapters(lambda p: model.apply({"params": p}, x))(t) - y) ** 2)
    end = jax.jit(lambda t: sj.training.scan_steps(loss, optax.adam(3e-2), t, steps=100))(adapted)
    assert end.losses[-1] < 0.9 * end.losses[0]


def test_bad_options_are_refused_by_name():
    bad = {"sparsity": 1.1, "kernel": "cubic", "rule": "x", "dropout": 1.0, "drop_path": -0.1, "dtype": jnp.float16}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            snell.snell(4, **{"sparsity": 0.5, name: value})
    with pytest.raises(RankError, match="rank=3 is not a multiple of pieces=2"):
        snell.snell(3, sparsity=0.5)
    with pytest.raises(RankError, match="rank=0"):
        snell.snell(0, sparsity=0.5)
