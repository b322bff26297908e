"""DR-Tune against loops over classes, SciPy's Procrustes, and features moved in a known way."""

import subprocess
import sys
from os import environ
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from scipy.spatial.transform import Rotation

import subspace_jax as sj
from subspace_jax.core import RankError, StructureError
from subspace_jax.methods.regularized.dr_tune import (
    calibrate,
    enqueue,
    fill,
    init_bank,
    new_epoch,
    rotate,
    rotation,
    translate,
)
from tests.eight_devices import eight_devices

dr_tune = sj.methods.dr_tune
K, E, C, B = 48, 12, 5, 8
rotation, rotate, translate = jax.jit(rotation), jax.jit(rotate), jax.jit(translate, static_argnames="confidence")
calibrate = jax.jit(calibrate, static_argnames=("classes", "confidence"))
loss = jax.jit(
    dr_tune.loss, static_argnames=("calibration", "rotate_every", "keep_rotation", "confidence", "regularize")
)


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def turn_of(size, seed=1):
    q = np.linalg.qr(draw(size, size, seed=seed))[0]
    q[:, 0] *= np.sign(np.linalg.det(q))
    return q


def array(x):
    return jnp.asarray(x, jnp.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def filled(p, z, y, size=K):
    bank = init_bank(size, p.shape[1])
    for i in range(0, size, B):
        bank = enqueue(bank, array(p[i : i + B]), array(z[i : i + B]), jnp.asarray(y[i : i + B], jnp.int32))
    return bank


@pytest.fixture
def features():
    labels = np.random.default_rng(2).integers(0, C, K)
    return draw(K, E), draw(K, E, seed=3) + 1, labels


def kabsch_objective(x, v, turn):
    return np.sum(((x - x.mean(0)) @ turn - (v - v.mean(0))) ** 2)


@pytest.mark.parametrize("seed", range(4))
def test_the_rotation_is_that_of_procrustes_with_determinant_one(seed):
    x, v = draw(K, E, seed=seed), draw(K, E, seed=seed + 10)
    if seed % 2:
        v = (x @ turn_of(E)) * np.r_[-np.ones(1), np.ones(E - 1)]  # the nearest orthogonal map mirrors
    found = np.asarray(rotation(array(x), array(v)), np.float64)
    np.testing.assert_allclose(found.T @ found, np.eye(E), atol=2e-6)
    assert np.linalg.det(found) == pytest.approx(1, abs=1e-5)
    xc, vc = x - x.mean(0), v - v.mean(0)
    u, _, qt = np.linalg.svd(xc.T @ vc)
    u[:, -1] *= np.sign(np.linalg.det(u @ qt))
    np.testing.assert_allclose(xc @ found, xc @ u @ qt, atol=3e-4)
    free, _ = scipy.linalg.orthogonal_procrustes(xc, vc)
    assert (np.linalg.det(free) < 0) or np.allclose(free, found, atol=1e-4)
    assert kabsch_objective(x, v, found) <= kabsch_objective(x, v, np.eye(E))


def test_in_three_dimensions_it_is_scipys():
    x, v = draw(9, 3), draw(9, 3, seed=5)
    found = rotation(array(x), array(v))
    expected = Rotation.align_vectors(v - v.mean(0), x - x.mean(0))[0].as_matrix()
    np.testing.assert_allclose(found, expected.T, atol=1e-5)


def test_turned_features_come_back():
    x, turn = draw(K, E), turn_of(E)
    v = x @ turn + 3
    omega = rotation(array(x), array(v))
    np.testing.assert_allclose(rotate(array(x), array(v), omega), v, atol=2e-5)
    held = np.arange(K) < 40
    x[~held], v[~held] = 1e3, -50.0
    np.testing.assert_allclose(rotation(array(x), array(v), held), omega, atol=1e-5)


def test_with_few_rows_the_rotation_serves_rows_that_come_later():
    """Eight rows in 32 dimensions: nothing is known of the others, which are left nearly as they are."""
    x = draw(8, 32)
    generator = 0.1 * draw(32, 32, seed=4)
    turn = scipy.linalg.expm(generator - generator.T)
    omega = np.asarray(rotation(array(x), array(x @ turn)), np.float64)
    np.testing.assert_allclose((x - x.mean(0)) @ omega, (x - x.mean(0)) @ turn, atol=1e-4)
    assert np.linalg.det(omega) == pytest.approx(1, abs=1e-4)
    still = np.asarray(rotation(array(x), array(x)), np.float64)
    later = unit(draw(40, 32, seed=6))
    assert np.mean(np.sum(later @ still * later, -1)) > 0.999
    # Of what lies outside the span of x and its turned self, nothing is changed.
    others = scipy.linalg.null_space(np.concatenate([x, x @ turn]))
    np.testing.assert_allclose(others.T @ omega @ others, np.eye(others.shape[1]), atol=0.05)


def test_classes_are_shifted_as_in_a_loop(features):
    x, v, labels = features
    w = draw(E, C, seed=7)
    labels = np.where(labels == 3, 2, labels)  # class 3 is absent
    labels[0] = -1
    labels[1:][labels[1:] == 4] = 0
    labels[1] = 4  # class 4 has one row
    expected = x.copy()
    for j in (0, 1, 2, 4):
        rows = labels == j
        a = np.exp(unit(v[rows]) @ unit(w[:, j]))
        a /= a.sum()
        expected[rows] += a @ v[rows] - x[rows].mean(0)
        np.testing.assert_allclose(a @ v[rows], expected[rows].mean(0), atol=1e-12)
    arguments = array(v), jnp.asarray(labels), array(w)
    found = translate(array(x), *arguments)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found[1], v[1], atol=1e-5)
    # The mean of the rotation is irrelevant: any constant is taken away again, but from the row of no class.
    np.testing.assert_allclose(translate(array(x + 7), *arguments)[1:], expected[1:], atol=2e-5)
    plain = translate(array(x), *arguments, confidence=False)
    for j in (0, 1, 2, 4):
        np.testing.assert_allclose(np.mean(plain[labels == j], 0), v[labels == j].mean(0), atol=1e-5)


def test_rows_have_the_batchs_length_and_unmoved_features_stay(features):
    p, _, y = features
    bank = filled(p, p, y)
    w = array(draw(E, C))
    for confidence, turn in ((True, None), (False, jnp.eye(E))):
        found = calibrate(bank, w, 7.0, turn=turn, confidence=confidence)
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 7.0, rtol=1e-5)
    np.testing.assert_allclose(found, 7 * unit(p), atol=2e-5)  # uniform weights


def test_a_drift_by_rotation_and_class_is_undone():
    """Clusters, moved by a rotation and a shift for each class: centers come 10 times closer, residuals line up."""
    y = np.arange(240) % C
    residuals = 0.3 * draw(240, 32, seed=8)
    p = 3 * draw(C, 32)[y] + residuals
    z = p @ turn_of(32, seed=9) + draw(C, 32, seed=10)[y]
    bank = filled(p, z, y, 240)
    omega = rotation(array(unit(p)), array(unit(z)))

    def centers(rows):
        return np.stack([np.mean(np.asarray(rows)[y == j], 0) for j in range(C)])

    def within(rows):
        return np.asarray(rows) - centers(rows)[y]

    head = array(0.01 * draw(32, C))
    both, shifted = calibrate(bank, head, 1.0, turn=omega), calibrate(bank, head, 1.0)
    before = np.linalg.norm(centers(unit(p)) - centers(unit(z)), axis=-1).mean()
    for found in (both, shifted):
        assert np.linalg.norm(centers(found) - centers(unit(z)), axis=-1).mean() < before / 10

    def alignment(rows):
        return np.corrcoef(within(rows).ravel(), within(unit(z)).ravel())[0, 1]

    # Only the rotation brings single rows to where they are; a shift of whole classes cannot.
    assert alignment(both) > 0.8
    assert abs(alignment(shifted)) < 0.3


def reference(z, y, w, c, moved, labels):
    logits = jnp.concatenate([array(z), moved]) @ array(w) + array(c)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.concatenate([y, labels])).mean()


def test_the_loss_is_one_cross_entropy_over_both(features):
    p, z, labels = features
    bank = filled(p, z, labels)
    x, y = draw(B, E, seed=11), jnp.arange(B) % C
    w, c = draw(E, C, seed=12), draw(C, seed=13)
    length = np.linalg.norm(x, axis=-1).mean()
    omega = rotation(array(unit(p)), array(unit(z)))
    moved = {
        "full": calibrate(bank, array(w), length, turn=omega),
        "rotation": calibrate(bank, array(w), length, turn=omega, classes=False),
        "translation": calibrate(bank, array(w), length),
        "none": array(length * unit(p)),
    }
    for name, rows in moved.items():
        found, after = loss(array(x), array(x), y, array(w), array(c), bank, calibration=name)
        assert float(found) == pytest.approx(float(reference(x, y, w, c, rows, bank.labels)), rel=1e-5)
    uncertain, _ = loss(array(x), array(x), y, array(w), array(c), bank, confidence=False)
    assert float(uncertain) != float(loss(array(x), array(x), y, array(w), array(c), bank)[0])
    compiled = loss._cache_size()
    # Order of rows, and what was there before the last K: nothing depends on it.
    order = np.random.default_rng(0).permutation(K)
    other = loss(array(x), array(x), y, array(w), array(c), filled(p[order], z[order], labels[order]))[0]
    assert float(other) == pytest.approx(float(loss(array(x), array(x), y, array(w), array(c), bank)[0]), rel=1e-5)
    assert np.array_equal(after.pretrained[:B], array(x))
    assert np.array_equal(after.pretrained[B:], bank.pretrained[B:])
    assert loss._cache_size() == compiled


def test_only_the_head_learns_from_the_bank(features):
    p, z, labels = features
    bank, y = filled(p, z, labels), jnp.arange(B) % C
    x, w, c = array(draw(B, E, seed=11)), array(draw(E, C, seed=12)), jnp.zeros(C)
    parts = jax.jit(
        jax.grad(
            lambda x, frozen, w, stored: dr_tune.loss(
                x, frozen, y, w, c, bank._replace(pretrained=stored[0], downstream=stored[1])
            )[0],
            argnums=(0, 1, 2, 3),
        )
    )(x, x + 1, w, (bank.pretrained, bank.downstream))
    plain = jax.jit(
        jax.grad(lambda x, w: optax.softmax_cross_entropy_with_integer_labels(x @ w + c, y).mean(), argnums=(0, 1))
    )(x, w)
    np.testing.assert_allclose(parts[0], B / (B + K) * plain[0], atol=1e-6)
    assert not np.any(parts[1])
    assert not np.any(parts[3][0])
    assert not np.any(parts[3][1])
    head = jax.jit(jax.grad(lambda w: loss(x, x, y, w, c, bank, regularize=False)[0]))(w)
    np.testing.assert_allclose(head, B / (B + K) * plain[1], atol=1e-6)
    assert np.abs(parts[2] - head).max() > 0.01
    length = np.linalg.norm(x, axis=-1).mean()
    moved = calibrate(bank, w, length, turn=rotation(array(unit(p)), array(unit(z))))
    np.testing.assert_allclose(
        parts[2], jax.jit(jax.grad(lambda w: reference(x, y, w, c, moved, bank.labels)))(w), atol=1e-5
    )


def test_rotations_by_schedule(features):
    """The first step of an epoch and every third turn anew; in between the last one is kept, or none as officially."""
    p, z, labels = features
    bank, y = filled(p, z, labels), jnp.arange(B) % C
    w = array(draw(E, C, seed=12))
    kept, dropped = [], []
    turns = []
    banks = {True: bank, False: bank}
    for i in range(4):
        x = array(draw(B, E, seed=20 + i))
        for keep, values in ((True, kept), (False, dropped)):
            before = banks[keep]
            turn = rotation(array(unit(before.pretrained)), array(unit(before.downstream)))
            found, banks[keep] = loss(x, x - 1, y, w, None, before, rotate_every=3, keep_rotation=keep)
            values.append(float(found))
            if keep:
                turns.append((np.asarray(turn), np.asarray(banks[keep].rotation)))
            elif i in (1, 2):
                assert float(found) == pytest.approx(
                    float(loss(x, x, y, w, None, before, calibration="translation")[0])
                )
    assert kept[0] == pytest.approx(dropped[0])
    assert kept[1] != pytest.approx(dropped[1], rel=1e-4)
    np.testing.assert_allclose(turns[0][1], turns[0][0], atol=1e-5)
    assert np.array_equal(turns[1][1], turns[0][1])
    assert np.array_equal(turns[2][1], turns[0][1])
    np.testing.assert_allclose(turns[3][1], turns[3][0], atol=1e-5)
    again = loss(x, x, y, w, None, new_epoch(banks[True]), rotate_every=3)[1]
    assert int(again.step) == 1
    assert not np.array_equal(again.rotation, banks[True].rotation)


def test_the_bank_is_a_queue_and_empty_rows_count_nowhere():
    y = np.arange(K) % C
    p = draw(2 * K, E)
    bank = init_bank(K, E)
    w, x = array(draw(E, C)), array(draw(B, E, seed=1))
    plain = optax.softmax_cross_entropy_with_integer_labels(x @ w, jnp.arange(B) % C).mean()
    assert float(loss(x, x, jnp.arange(B) % C, w, None, bank)[0]) == pytest.approx(float(plain), rel=1e-5)
    for i in range(0, K + 2 * B, B):
        bank = fill(bank, array(p[i : i + B]), jnp.asarray((y[i % K :][:B] + i // K) % C, jnp.int32))
        if i == B:
            few = bank
    assert np.array_equal(bank.pretrained, np.concatenate([p[K : K + 2 * B], p[2 * B : K]]).astype(np.float32))
    assert np.array_equal(bank.pretrained, bank.downstream)
    assert int(bank.pointer) == 2 * B
    # With 16 of 48 rows filled, the loss is that of a bank of 16.
    small = filled(p, p, y, 2 * B)
    found = [float(loss(x, x, jnp.arange(B) % C, w, None, b)[0]) for b in (few, small)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert np.isfinite(found).all()


def test_bfloat16_features_are_stored_and_compared_in_float32(features):
    p, z, labels = features
    bank, y = filled(p, z, labels), jnp.arange(B) % C
    x, w = array(draw(B, E)).astype(jnp.bfloat16), array(draw(E, C)).astype(jnp.bfloat16)
    found, after = loss(x, x, y, w, None, bank)
    wide, _ = loss(x.astype(jnp.float32), x, y, w.astype(jnp.float32), None, bank)
    assert found.dtype == after.pretrained.dtype == jnp.float32
    assert float(found) == pytest.approx(float(wide), rel=1e-5)


def test_bad_input_is_refused():
    bank, x, y, w = init_bank(8, 3), jnp.ones((4, 3)), jnp.zeros(4, jnp.int32), jnp.ones((3, 2))
    with pytest.raises(RankError, match="size=0"):
        init_bank(0, 3)
    with pytest.raises(StructureError, match=r"a batch of 3 does not divide the bank's 8 rows"):
        fill(bank, x[:3], y[:3])
    with pytest.raises(StructureError, match=r"pretrained \(4, 2\)"):
        dr_tune.loss(x, x[:, :2], y, w, None, bank)
    with pytest.raises(StructureError, match="integers"):
        dr_tune.loss(x, x, jnp.zeros(4), w, None, bank)
    with pytest.raises(StructureError, match=r"kernel \(2, 3\)"):
        dr_tune.loss(x, x, y, w.T, None, bank)
    with pytest.raises(ValueError, match="calibration='both'"):
        dr_tune.loss(x, x, y, w, None, bank, calibration="both")
    with pytest.raises(RankError, match="rotate_every"):
        dr_tune.loss(x, x, y, w, None, bank, rotate_every=0)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from subspace_jax.methods import dr_tune
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
y = jnp.arange(16) % 4
bank = dr_tune.fill(dr_tune.init_bank(32, 6), draw(16, 6), y)
bank = dr_tune.enqueue(bank, draw(16, 6), draw(16, 6), y)
arguments = draw(16, 6), draw(16, 6), y, draw(6, 4), draw(4)
one = jax.jit(dr_tune.loss)(*arguments, bank)
rows = [jax.device_put(v, NamedSharding(mesh, P("data"))) for v in arguments[:3]]
split = jax.jit(dr_tune.loss)(*rows, *arguments[3:], jax.device_put(bank, NamedSharding(mesh, P())))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, split)
"""


def test_a_batch_split_over_devices_goes_into_one_bank():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environ | eight_devices(),
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
