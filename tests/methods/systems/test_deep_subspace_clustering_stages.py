"""Stopping, networks and the three stages on curved subspaces that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from experiments.systems.deep_subspace_clustering import subspaces
from subspace_jax.methods import deep_subspace_clustering as dsc


def test_windows_stop_where_an_oscillation_does_not():
    """A loss of a constant falls into place at once; one that still falls goes on, whatever its turning points."""
    flat = dsc.minimize(lambda v, _: 1.0 + 0.0 * jnp.sum(v), jnp.zeros(2), None, dsc.StoppingRule(least=0))
    assert int(flat.iterations) == 20  # two windows
    five = dsc.StoppingRule(window=1, tolerance=1e-3, hits=5, least=0)
    assert int(dsc.minimize(lambda v, _: 1.0 + 0.0 * jnp.sum(v), jnp.zeros(2), None, five).iterations) == 6
    late = dsc.minimize(lambda v, _: 1.0 + 0.0 * jnp.sum(v), jnp.zeros(2), None, dsc.StoppingRule(least=45))
    assert int(late.iterations) == 45
    falling = dsc.StoppingRule(most=37, tolerance=0.0)
    end = dsc.minimize(lambda v, c: jnp.sum((v - c) ** 2), jnp.zeros(2), jnp.ones(2), falling)
    assert int(end.iterations) == 37
    losses = np.asarray(end.losses)
    np.testing.assert_allclose(losses[0], 2.0)
    assert (np.diff(losses) < 0).all()


def test_networks_mirror_and_are_compiled_once():
    x = jnp.asarray(np.random.default_rng(8).normal(size=(4, 9, 7, 2)), jnp.float32)
    net = dsc.conv_network((3, 5), (5, 3))
    assert net is dsc.conv_network([3, 5], [5, 3])
    params = net.init(jax.random.key(0), x)
    shapes = [z.shape for z in dsc.expressed_layers(net, params["encoder"], x)]
    assert shapes == [(4, 126), (4, 5 * 4 * 3), (4, 3 * 2 * 5)]
    last = net.encode(params["encoder"], x)[-1]
    assert net.decode(params["decoder"], last, x).shape == x.shape
    assert params["decoder"]["layer_0"]["kernel"].shape[:2] == (3, 3)
    rule = dsc.StoppingRule(most=30)
    end = dsc.pretrain(net, params, x, rule=rule)
    before = dsc.minimize._cache_size()
    assert end.losses[29] < end.losses[0]
    dsc.pretrain(dsc.conv_network((3, 5), (5, 3)), params, x + 1, rule=rule)
    assert dsc.minimize._cache_size() == before
    flat = x.reshape(4, -1)
    dense = dsc.dense_network((6,))
    start = dense.init(jax.random.key(0), flat)
    kept = dsc.pretrain(dense, start, flat, kind="distance", rule=rule)
    assert np.isfinite(np.asarray(kept.losses[:30])).all()
    assert kept.losses[29] < kept.losses[0]
    np.testing.assert_array_equal(kept.variables["decoder"]["layer_0"]["kernel"], start["decoder"]["layer_0"]["kernel"])


@pytest.fixture(scope="module")
def curved():
    x, y = subspaces(0, 4, 40, curved=True)
    told = []
    options = {"d_sub": 5, "key": jax.random.key(0), "on_stage": lambda name, losses: told.append(name)}
    found = dsc.cluster(x, 5, dsc.dense_network((64, 48, 24)), **options)
    assert told == list(found.stages)
    assert told[:3] == ["pretraining", "self-expression", "tuning 1"]
    return x, y, found


def test_curved_subspaces_are_found_where_the_last_layer_and_k_means_fail(curved):
    x, y, found = curved
    score = lambda labels: sj.metrics.clustering_accuracy(y, labels)
    assert score(found.labels) >= 0.9
    assert score(found.labels) >= score(found.rounds[0]) - 0.02
    assert score(dsc.k_means(x, 5)) <= score(found.labels) - 0.25
    net = dsc.dense_network((64, 48, 24))
    params = dsc.pretrain(net, net.init(jax.random.key(0), jnp.asarray(x)), jnp.asarray(x)).variables
    last = dsc.self_express(net, params["encoder"], jnp.asarray(x), layers=(3,)).variables["coefficients"]
    assert score(dsc.spectral_clusters(dsc.affinity(last, 5), 5)) <= score(found.labels) - 0.25


def test_every_stage_falls_and_stops_by_itself(curved):
    found = curved[2]
    most = {"pretraining": 3000, "self-expression": 1000}
    for name, losses in found.stages.items():
        assert losses[-10:].mean() < losses[:10].mean()
        assert len(losses) < most.get(name, 300)
    assert not np.diag(found.coefficients).any()
    np.testing.assert_array_equal(found.affinity, found.affinity.T)
    assert (found.affinity >= 0).all()
    same = [dsc.same_partition(a, b) for a, b in zip(found.rounds[:-1], found.rounds[1:], strict=True)]
    assert same == [False] * (len(same) - 1) + [True]  # the first round that changes nothing is the last


def test_new_samples_go_to_the_nearest_subspace(curved):
    x, y, found = curved
    bases = dsc.cluster_subspaces(x, found.labels, 8)
    rows = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float64)
    wide = [np.asarray(b, np.float64) for b in bases]
    expected = [np.argmin([np.linalg.norm(z - b @ (b.T @ z)) for b in wide]) for z in rows]
    np.testing.assert_array_equal(dsc.nearest_subspace(x, bases), expected)
    assert sj.metrics.clustering_accuracy(y, expected) > 0.8


def test_tuning_cuts_what_connects_clusters_and_pure_tuning_nothing_else(curved):
    x, _, found = curved
    x, labels = jnp.asarray(x[::4]), jnp.asarray(found.labels[::4])
    net, rule = dsc.dense_network((8,)), dsc.StoppingRule(most=60)
    start = dsc.self_express(net, net.init(jax.random.key(1), x)["encoder"], x, rule=rule).variables
    own = {**start, "coefficients": start["coefficients"] + jnp.eye(len(x))}
    assert not np.diag(dsc.tune(net, own, x, labels, rule=rule).variables["coefficients"]).any()
    for mode in ("sum", "pure"):
        tuned = dsc.tune(net, start, x, labels, mode=mode, rule=rule).variables
        assert dsc.structured_norm(tuned["coefficients"], labels) < 0.9 * dsc.structured_norm(
            start["coefficients"], labels
        )
        same = labels[:, None] == labels
        inside = np.abs(tuned["coefficients"] - start["coefficients"])[np.asarray(same)]
        assert (inside.max() == 0) == (mode == "pure")
