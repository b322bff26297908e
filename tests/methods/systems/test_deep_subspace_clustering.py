"""Self-expression, stopping, read-out and all stages, against NumPy in float64, scikit-learn, and known subspaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans, SpectralClustering

import subspace_jax as sj
from experiments.systems.deep_subspace_clustering import subspaces
from subspace_jax.methods import deep_subspace_clustering as dsc

N = 12


def layers(seed=0, widths=(7, 5)):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(N, w)).astype(np.float32) for w in widths]


def matrix(seed=1):
    return np.random.default_rng(seed).normal(size=(N, N)).astype(np.float32)


def loss64(c, parts, rho):
    c = c.astype(np.float64) * (1 - np.eye(len(c)))
    total = rho * (c**2).sum()
    for z in parts:
        rows = z.astype(np.float64) / np.linalg.norm(z, axis=1, keepdims=True)
        for j in range(len(c)):
            total += ((rows[j] - sum(c[i, j] * rows[i] for i in range(len(c)))) ** 2).sum()
    return total / len(c)


@pytest.mark.parametrize("rho", [0.0, 1.0, 2.5])
def test_loss_expresses_column_by_column(rho):
    """With a matrix that is not symmetric: C and its transpose are not the same."""
    c, parts = matrix(), layers()
    np.testing.assert_allclose(dsc.expression_loss(c, parts, rho), loss64(c, parts, rho), rtol=1e-5)
    assert abs(loss64(c.T, parts, rho) / loss64(c, parts, rho) - 1) > 1e-2


def test_loss_knows_neither_rotations_nor_lengths_and_a_layer_counts_as_often_as_it_is_given():
    c, (a, b) = matrix(), layers()
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(7, 7)))[0].astype(np.float32)
    lengths = np.random.default_rng(3).uniform(0.1, 9, (N, 1)).astype(np.float32)
    expected = dsc.expression_loss(c, [a, b])
    np.testing.assert_allclose(dsc.expression_loss(c, [lengths * a @ turn, b]), expected, rtol=1e-5)
    twice = dsc.expression_loss(c, [a, b, b], 0.0)
    once, alone = dsc.expression_loss(c, [a, b], 0.0), dsc.expression_loss(c, [b], 0.0)
    np.testing.assert_allclose(twice - once, alone, rtol=1e-5)
    images = np.concatenate([a, b], 1).reshape(N, 3, 4, 1)
    flat = dsc.expression_loss(c, [np.concatenate([a, b], 1)])
    np.testing.assert_allclose(dsc.expression_loss(c, [images]), flat, rtol=1e-6)


def test_normal_rows_and_their_gradient_at_zero():
    rows = dsc.normalize_rows(jnp.array([[3.0, 4.0], [0.0, 0.0]], jnp.bfloat16))
    assert rows.dtype == jnp.float32
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda z: dsc.normalize_rows(z).sum()))(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("rho", [0.1, 1.0])
def test_closed_form_is_a_ridge_regression_on_all_others_and_has_no_gradient(rho):
    parts = layers()
    found = dsc.closed_form(parts, rho)
    stacked = np.concatenate([z / np.linalg.norm(z, axis=1, keepdims=True) for z in parts], 1).astype(np.float64)
    for j in range(N):
        others = np.delete(np.arange(N), j)
        a = stacked[others].T  # features by samples
        expected = np.linalg.solve(a.T @ a + rho * np.eye(N - 1), a.T @ stacked[j])
        np.testing.assert_allclose(found[others, j], expected, atol=1e-5)
    assert not np.diag(found).any()
    gradient = jax.jit(jax.grad(dsc.expression_loss))(found, [jnp.asarray(z) for z in parts], rho)
    assert np.abs(gradient).max() < 1e-4
    twin = dsc.closed_form([np.ones((2, 3), np.float32)], rho)
    np.testing.assert_allclose(twin, [[0, 1 / (1 + rho)], [1 / (1 + rho), 0]], rtol=1e-6)


def test_independent_subspaces_give_blocks():
    rng = np.random.default_rng(4)
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    x = np.concatenate([rng.normal(size=(10, 3)) @ basis[3 * k : 3 * k + 3] for k in range(3)])
    c = np.abs(dsc.closed_form([x.astype(np.float32)], 1e-3))
    inside = np.kron(np.eye(3), np.ones((10, 10))).astype(bool)
    assert c[~inside].sum() / c.sum() < 1e-2
    labels = dsc.spectral_clusters(dsc.affinity(c, 4), 3)
    assert sj.metrics.clustering_accuracy(np.repeat(np.arange(3), 10), labels) == 1


def test_structured_norm_is_the_mass_between_clusters():
    c, labels = matrix(), np.random.default_rng(5).integers(0, 3, N)
    onehot = np.eye(3)[labels]
    expected = sum(abs(float(c[i, j])) * 0.5 * ((onehot[i] - onehot[j]) ** 2).sum() for i in range(N) for j in range(N))
    np.testing.assert_allclose(dsc.structured_norm(c, labels), expected, rtol=1e-5)
    np.testing.assert_allclose(dsc.structured_norm(c, (labels + 1) % 3), expected, rtol=1e-5)
    assert dsc.structured_norm(c, np.zeros(N, int)) == 0
    blocks = np.where(labels[:, None] == labels, c, 0)
    assert dsc.structured_norm(blocks, labels) == 0


@pytest.mark.parametrize(("kept", "expected"), [(3, 3), (N - 1, N - 1), (50, N - 1)])
def test_affinity_keeps_the_largest_of_each_column(kept, expected):
    c = matrix(6)
    found = np.asarray(dsc.affinity(jnp.asarray(c), kept))
    sparse = np.zeros((N, N))
    for j in range(N):
        column = np.abs(c[:, j].astype(np.float64))
        column[j] = -1
        chosen = np.argsort(-column, kind="stable")[:expected]
        sparse[chosen, j] = column[chosen] / column.max()
    np.testing.assert_allclose(found, sparse + sparse.T, rtol=1e-6)
    tied = np.asarray(dsc.affinity(jnp.ones((4, 4)), 1))  # ties by index: row 0, and row 1 for column 0
    np.testing.assert_array_equal(tied, [[0, 2, 1, 1], [2, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    assert not np.asarray(dsc.affinity(jnp.zeros((3, 3)), 2)).any()


def test_spectral_clusters_are_scikit_learns():
    x, y = subspaces(0, 3, 12, curved=False)
    graph = np.asarray(dsc.affinity(dsc.closed_form([x]), 4), np.float64)
    theirs = SpectralClustering(5, affinity="precomputed", random_state=0).fit_predict(graph)
    ours = dsc.spectral_clusters(graph, 5)
    assert sj.metrics.clustering_accuracy(y, ours) >= sj.metrics.clustering_accuracy(y, theirs) - 0.05
    isolated = np.zeros((5, 5))
    isolated[0, 1] = isolated[1, 0] = 1
    labels = dsc.spectral_clusters(isolated, 2)
    assert labels[0] == labels[1]


def test_k_means_is_as_good_as_scikit_learns():
    x = np.random.default_rng(7).normal(size=(90, 2)) + 4 * np.repeat(np.eye(3)[:, :2], 30, 0)
    inertia = lambda labels: sum(((x[labels == k] - x[labels == k].mean(0)) ** 2).sum() for k in set(labels))
    theirs = KMeans(3, n_init=10, random_state=0).fit(x)
    np.testing.assert_allclose(inertia(dsc.k_means(x, 3)), theirs.inertia_, rtol=1e-3)
    np.testing.assert_array_equal(dsc.k_means(x, 3, seed=1), dsc.k_means(x, 3, seed=1))
    assert set(dsc.k_means(np.zeros((4, 2)), 3)) <= {0, 1, 2}  # equal points: no seeding by distance


def test_samples_in_another_order_are_clustered_alike():
    x, _ = subspaces(1, 3, 12, curved=False)
    order = np.random.default_rng(9).permutation(len(x))
    plain, moved = dsc.closed_form([x]), dsc.closed_form([x[order]])
    np.testing.assert_allclose(moved, np.asarray(plain)[np.ix_(order, order)], atol=1e-5)
    one, other = (dsc.spectral_clusters(dsc.affinity(c, 4), 5) for c in (plain, moved))
    assert dsc.same_partition(one[order], other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, x: dsc.cluster(x[:1], 1, n, d_sub=2, key=jax.random.key(0)), "two or more samples"),
        (lambda n, x: dsc.cluster(x * np.nan, 2, n, d_sub=2, key=jax.random.key(0)), "finite"),
        (lambda n, x: dsc.cluster(x, 99, n, d_sub=2, key=jax.random.key(0)), "clusters=99"),
        (lambda n, x: dsc.cluster(x, 2, n, d_sub=0, key=jax.random.key(0)), "d_sub=0"),
        (lambda n, x: dsc.cluster(x, 2, n, d_sub=2, key=jax.random.key(0), rounds=-1), "rounds=-1"),
        (lambda n, x: dsc.pretrain(n, {}, x, kind="contrast"), "kind='contrast'"),
        (lambda n, x: dsc.self_express(n, {}, x, start="ones"), "start='ones'"),
        (lambda n, x: dsc.self_express(n, {}, x, rho=-1.0), "rho=-1.0"),
        (lambda n, x: dsc.tune(n, {}, x, jnp.zeros(N), mode="both"), "mode='both'"),
        (lambda n, x: dsc.closed_form([x], 0.0), "rho=0.0"),
        (lambda n, x: dsc.conv_network((3, 3), (3,)), "1 kernels for 2 layers"),
        (lambda n, x: dsc.dense_network((0,)), "widths=0"),
        (lambda n, x: dsc.StoppingRule(hits=0), "hits=0"),
        (lambda n, x: dsc.StoppingRule(tolerance=-1.0), "tolerance=-1.0"),
        (lambda n, x: dsc.spectral_clusters(-np.ones((3, 3)), 2), "without negative edges"),
        (lambda n, x: dsc.spectral_clusters(np.triu(np.ones((3, 3))), 2), "symmetric"),
        (lambda n, x: dsc.spectral_clusters(np.ones((3, 3)), 4), "clusters=4"),
        (lambda n, x: dsc.k_means(x, 0), "clusters=0"),
        (lambda n, x: dsc.cluster_subspaces(x, np.zeros(N, int), 8), "dim=8"),
        (lambda n, x: sj.metrics.clustering_accuracy([0, 1], [0]), "2 classes and 1 clusters"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(dsc.dense_network((4,)), jnp.asarray(layers()[0]))
    net = dsc.dense_network((4,))
    x = jnp.asarray(layers()[0])
    with pytest.raises(ValueError, match=r"layers=\(2,\)"):
        dsc.self_express(net, net.init(jax.random.key(0), x)["encoder"], x, layers=(2,))
