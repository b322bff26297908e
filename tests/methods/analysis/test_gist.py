"""GIST against NumPy's decomposition of the gradients themselves, and what its scores may depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import RankError, StructureError
from subspace_jax.methods.analysis.gist import (
    Scores,
    example_gradients,
    fit_subspace,
    score_examples,
    select_examples,
    total_scores,
)
from subspace_jax.methods.analysis.gist._subspace import share_of

KEY = jax.random.key(0)
D = 20


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def linear(params, example):
    """Its gradient is the example: 12 numbers for one leaf, 8 for the other."""
    return params["a"].reshape(-1) @ example[:12] + params["b"] @ example[12:]


PARAMS = {"a": jnp.zeros((3, 4)), "b": jnp.zeros(8)}
single = lambda x: jnp.asarray(x, jnp.float32)


def flat(basis):
    return np.concatenate([np.asarray(v, np.float64).reshape(len(v), -1) for v in jax.tree.leaves(basis)], axis=1)


def test_the_basis_is_that_of_the_decomposition():
    g = normal(6, D)
    found = fit_subspace(linear, PARAMS, single(g), rank=4)
    _, s, vt = np.linalg.svd(g, full_matrices=False)
    p = flat(found.basis)
    np.testing.assert_allclose(p @ p.T, np.eye(4), atol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(p * vt[:4], axis=1)), 1.0, atol=1e-4)
    np.testing.assert_allclose(found.singular_values, s, rtol=1e-4)
    target = (g @ p.T).mean(0)
    np.testing.assert_allclose(found.targets[0], target / np.linalg.norm(target), atol=1e-4)
    whole = fit_subspace(linear, PARAMS, single(g), rank=30)
    assert whole.rank == 6
    coordinates = g @ flat(whole.basis).T
    np.testing.assert_allclose(coordinates @ coordinates.T, g @ g.T, rtol=1e-3, atol=1e-3)  # an isometry


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.95, 1.0])
def test_energy_says_how_many(energy):
    g = normal(8, D) @ np.diag(np.geomspace(1, 1e-1, D))
    found = fit_subspace(linear, PARAMS, single(g), energy=energy)
    share = np.cumsum(np.linalg.svd(g, compute_uv=False) ** 2)
    share = share / share[-1]
    assert share[found.rank - 1] >= energy - 1e-6
    assert found.rank == 1 or share[found.rank - 2] < energy


def test_what_rounding_left_is_no_direction():
    g = np.outer(normal(5), normal(D, seed=1)) + 1e-9 * normal(5, D, seed=2)
    found = fit_subspace(linear, PARAMS, single(g), rank=5)
    assert found.rank < 5
    assert np.abs(np.linalg.norm(flat(found.basis), axis=1) - 1).max() < 1e-3


@pytest.mark.parametrize("aggregate", ["subtask_mean", "example"])
def test_scores_are_cosines_after_projection(aggregate):
    g, t = normal(6, D), normal(11, D, seed=1)
    found = fit_subspace(linear, PARAMS, single(g), rank=6, subtasks=3, aggregate=aggregate)
    scores = score_examples(linear, PARAMS, found, single(t), batch_size=4)
    onto = g.T @ np.linalg.lstsq(g.T, t.T, rcond=None)[0]
    targets = g.reshape(3, 2, D).mean(1) if aggregate == "subtask_mean" else g
    expected = (onto / np.linalg.norm(onto, axis=0)).T @ (targets / np.linalg.norm(targets, axis=1, keepdims=True)).T
    np.testing.assert_allclose(scores.scores, expected, atol=1e-4)
    assert np.abs(scores.scores).max() <= 1 + 1e-6
    np.testing.assert_allclose(scores.shares, np.linalg.norm(onto, axis=0) / np.linalg.norm(t, axis=1), rtol=1e-3)
    gated = score_examples(linear, PARAMS, found, single(t), energy_gate=True)
    np.testing.assert_allclose(gated.scores, scores.scores * scores.shares[:, None], rtol=1e-4, atol=1e-6)


def test_what_scores_do_not_depend_on():
    g, t = normal(4, D), normal(7, D, seed=1)
    scores = lambda g, t: (
        score_examples(linear, PARAMS, fit_subspace(linear, PARAMS, single(g), rank=4), single(t)).scores
    )
    plain = scores(g, t)
    sizes = np.array([1e-6, 1, 1e3, 1, 1, 1, 1])[:, None]
    np.testing.assert_allclose(scores(g, t * sizes), plain, atol=1e-4)
    for scale in (1e-4, 1e4):
        np.testing.assert_allclose(scores(scale * g, t), plain, atol=1e-4)
    turn = np.linalg.qr(normal(D, D, seed=5))[0]
    np.testing.assert_allclose(scores(g @ turn, t @ turn), plain, atol=1e-4)
    outside = np.eye(D) - np.linalg.pinv(g) @ g
    np.testing.assert_allclose(scores(g, t + normal(7, D, seed=8) @ outside), plain, atol=1e-4)
    assert np.abs(scores(g * np.geomspace(1, 10, D), t * np.geomspace(1, 10, D)) - plain).max() > 0.01


def test_ends_of_the_scale():
    g = normal(4, D)
    found = fit_subspace(linear, PARAMS, single(g), rank=4)
    outside = normal(D, seed=3) @ (np.eye(D) - np.linalg.pinv(g) @ g)
    ends = single(np.stack([g.mean(0), -g.mean(0), outside, np.zeros(D)]))
    np.testing.assert_allclose(score_examples(linear, PARAMS, found, ends).scores[:, 0], [1, -1, 0, 0], atol=1e-4)


def test_gradients_of_a_lora_are_those_of_one_example_at_a_time():
    params = {"w": single(normal(5, 4)), "b": jnp.zeros(4)}
    adapted = sj.adapt(params, {"w": sj.lora(2)}, key=KEY)
    trainable, frozen = sj.partition(adapted)
    trainable = jax.tree.map(lambda v: v + 0.1, trainable)
    apply = sj.with_adapters(lambda p, x: x @ p["w"] + p["b"])
    loss = lambda t, e: jnp.sum((apply(sj.combine(t, frozen), e["x"][None]) - e["y"]) ** 2)
    examples = {"x": single(normal(3, 5)), "y": single(normal(3, 4, seed=1))}
    found = example_gradients(loss, trainable, examples)
    slope = jax.jit(jax.grad(loss))
    for i in range(3):
        one = slope(trainable, jax.tree.map(lambda v, i=i: v[i], examples))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)
    target = fit_subspace(loss, trainable, examples, rank=2)
    scores = score_examples(loss, trainable, target, examples, batch_size=2)
    assert scores.coordinates.shape == (3, 2)
    assert {v.shape[0] for v in jax.tree.leaves(target.basis)} == {2}


def test_checkpoints_and_selection():
    one = Scores(np.array([[0.2, 0.8], [0.9, 0.0], [0.1, 0.1]]), np.zeros((3, 1)), np.ones(3))
    two = Scores(np.array([[0.2, -0.8], [0.9, 0.5], [0.0, 0.0]]), np.zeros((3, 1)), np.ones(3))
    np.testing.assert_allclose(total_scores([one, two], [3.0, 1.0]), [0.4, 0.9, 0.075])
    assert select_examples(total_scores([one, two]), 0.7).tolist() == [1, 0]
    assert len(select_examples(np.zeros(100), 0.29)) == 29
    assert select_examples(np.zeros(100), 0.05).tolist() == [0, 1, 2, 3, 4]
    assert share_of(1 / 3, 9) == 3


def test_refusals():
    with pytest.raises(StructureError, match="all validation gradients are zero"):
        fit_subspace(linear, PARAMS, jnp.zeros((3, D)))
    with pytest.raises(StructureError, match="expected one number above 0"):
        fit_subspace(linear, PARAMS, jnp.zeros((0, D)))
    with pytest.raises(StructureError, match=r"\(2,\) groups for 3 validation examples"):
        fit_subspace(linear, PARAMS, single(normal(3, D)), subtasks=[0, 1])
    with pytest.raises(RankError, match="rank"):
        fit_subspace(linear, PARAMS, single(normal(3, D)), rank=0)
    with pytest.raises(ValueError, match="fraction"):
        select_examples(np.zeros(3), 0.0)
    with pytest.raises(StructureError, match="2 weights for 1 checkpoints"):
        total_scores([Scores(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros(1))], [1.0, 2.0])
