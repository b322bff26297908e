"""DCT-AdamW and Trion against scipy, brute force over columns, and Adam and Muon in full rank."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft

import subspace_jax as sj
from subspace_jax.core import RankError, Role
from subspace_jax.linalg import chosen_columns, fixed_basis, newton_schulz, select_columns, transform_rows
from tests.tolerances import tolerance


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("size", [4, 7, 12, 13])
def test_the_transform_is_scipys_and_its_fast_form_the_same(size):
    matrix = normal(5, size)
    expected = scipy.fft.dct(np.asarray(matrix, np.float64), type=2, norm="ortho", axis=1)
    for transform in ("matmul", "fft"):
        np.testing.assert_allclose(transform_rows(matrix, transform=transform), expected, rtol=1e-4, atol=1e-5)
    for basis in ("dct", "random_qr"):
        q = fixed_basis(size, basis)
        np.testing.assert_allclose(q.T @ q, np.eye(size), atol=tolerance(size=4))


@pytest.mark.parametrize("basis", ["dct", "random_qr"])
def test_no_other_columns_approximate_better(basis):
    for seed in range(4):
        matrix = np.asarray(normal(6, 7, seed=seed), np.float64)
        q = np.asarray(fixed_basis(7, basis), np.float64)

        def error(columns, matrix=matrix, q=q):
            return np.linalg.norm(matrix - matrix @ q[:, columns] @ q[:, columns].T) ** 2

        found = select_columns(jnp.asarray(matrix, jnp.float32), 3, basis=basis, norm=2)
        best = min(itertools.combinations(range(7), 3), key=lambda c: error(list(c)))
        assert found.indices.tolist() == list(best)
        assert error(list(best)) <= (1 - 3 / 7) * np.linalg.norm(matrix) ** 2 + 1e-9
        np.testing.assert_allclose(found.coordinates, matrix @ q[:, list(best)], rtol=1e-3, atol=1e-4)


def test_scores_by_sums_of_sizes():
    matrix = normal(6, 7)
    scores = np.abs(np.asarray(matrix) @ np.asarray(fixed_basis(7))).sum(0)
    assert select_columns(matrix, 2).indices.tolist() == sorted(np.argsort(-scores)[:2].tolist())


@pytest.mark.parametrize(("basis", "size"), [("dct", 13), ("random_qr", 13), ("dct", 64)])
@pytest.mark.parametrize("norm", [1, 2])
def test_large_stacks_are_transformed_in_parts_and_give_the_same(monkeypatch, basis, size, norm):
    matrix = normal(2, 3, 5, size)
    whole = select_columns(matrix, 4, basis=basis, norm=norm)
    module = sys.modules[select_columns.__module__]
    monkeypatch.setattr(module, "BLOCK", 5)  # three blocks, the last of them not full; 64 is folded on one device
    monkeypatch.setattr(module, "LARGE", 10)
    parts = jax.jit(lambda m: select_columns(m, 4, basis=basis, norm=norm))(matrix)
    np.testing.assert_array_equal(parts.indices, whole.indices)
    np.testing.assert_allclose(parts.coordinates, whole.coordinates, atol=tolerance(size=size))


def run(optimizer, gradients, params):
    state, made = optimizer.init(params), []
    step = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = step(gradient, state)
        made.append(updates)
    return made, state


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
@pytest.mark.parametrize("basis", ["dct", "random_qr"])
def test_full_rank_is_adam_in_rotated_coordinates(shape, basis):
    gradients = [{"w": normal(*shape, seed=s)} for s in range(6)]
    made, state = run(sj.methods.dct_lowrank.scale_by_dct_adam(9, basis=basis), gradients, gradients[0])
    q = fixed_basis(min(shape), basis)
    turn = (lambda g: q.T @ g) if shape[0] <= shape[1] else (lambda g: g @ q)
    back = (lambda g: q @ g) if shape[0] <= shape[1] else (lambda g: g @ q.T)
    expected, _ = run(optax.scale_by_adam(), [{"w": turn(g["w"])} for g in gradients], gradients[0])
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_allclose(one["w"], back(other["w"]), rtol=2e-3, atol=2e-4)
    assert np.abs(state.error["w"]).max() < 1e-4


def reference(gradients, rank, rotate, feedback, every):
    """The published steps in float64, with matrices for the rotation; eps is large, so that no rounding is blown up."""
    size = min(gradients[0].shape)
    q = np.asarray(fixed_basis(size), np.float64)
    error, indices, m, v, made = 0.0, None, 0.0, 0.0, []
    for t, gradient in enumerate(gradients, start=1):
        wide = np.asarray(gradient, np.float64)
        oriented = wide.T if wide.shape[0] <= wide.shape[1] else wide
        whole = oriented + error if feedback else oriented
        previous = indices
        if t == 1 or (t - 1) % every == 0:
            indices = np.sort(np.argsort(-np.abs(whole @ q).sum(0), kind="stable")[:rank])
        low = whole @ q[:, indices]
        if rotate and previous is not None:
            rotation = q[:, previous].T @ q[:, indices]
            m, v = m @ rotation, np.abs(v @ rotation)
        error = whole - low @ q[:, indices].T
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low * low
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-2) @ q[:, indices].T
        made.append(step.T if wide.shape[0] <= wide.shape[1] else step)
    return made, error


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("feedback", "every"), [(True, 1), (False, 1), (True, 3)])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_against_the_published_steps(rotate, feedback, every, shape):
    gradients = [normal(*shape, seed=s) for s in range(8)]
    optimizer = sj.methods.dct_lowrank.scale_by_dct_adam(
        2, eps=1e-2, rotate=rotate, error_feedback=feedback, every=every
    )
    made, state = run(optimizer, [{"w": g} for g in gradients], {"w": gradients[0]})
    expected, error = reference(gradients, 2, rotate, feedback, every)
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_allclose(one["w"], other, rtol=5e-3, atol=1e-3)
    if feedback:
        np.testing.assert_allclose(state.error["w"], error, rtol=1e-3, atol=1e-3)


def test_what_is_left_out_adds_up():
    """The sum of gradients is that of their lifted coordinates and the error at the end."""
    gradients, total = [normal(8, 5, seed=s) for s in range(6)], 0.0
    optimizer = sj.methods.dct_lowrank.scale_by_dct_adam(2)
    state = optimizer.init({"w": gradients[0]})
    for gradient in gradients:
        before = state.error["w"]
        _, state = optimizer.update({"w": gradient}, state)
        whole = gradient + before
        columns = chosen_columns(state.indices["w"], 5)
        total = total + whole @ columns @ columns.T
    np.testing.assert_allclose(sum(gradients), total + state.error["w"], rtol=1e-4, atol=1e-4)


def test_updates_have_the_rank_and_lie_in_the_columns():
    gradient = normal(9, 6)
    for optimizer in (sj.methods.dct_lowrank.scale_by_dct_adam(2), sj.methods.dct_lowrank.scale_by_trion(2)):
        (updates,), _ = run(optimizer, [{"w": gradient}], {"w": gradient})
        assert np.linalg.matrix_rank(np.asarray(updates["w"]), tol=1e-4) == 2
        indices = select_columns(gradient, 2).indices
        columns = chosen_columns(indices, 6)
        np.testing.assert_allclose(updates["w"] @ columns @ columns.T, updates["w"], atol=1e-5)


def test_state_sizes():
    params = {"w": jnp.ones((9, 6)), "b": jnp.ones(6), "big": jnp.ones((40, 2))}
    optimizer = sj.methods.dct_lowrank.scale_by_dct_adam(2, error_feedback=False, largest=32)
    state = optimizer.init(params)
    sizes = {name: sum(v.size for part in state[1:] for v in jax.tree.leaves(part[name])) for name in params}
    assert sizes == {"b": 2 * 6, "big": 2 * 80, "w": 2 * 9 * 2 + 2}
    with_feedback = sj.methods.dct_lowrank.scale_by_dct_adam(2).init({"w": params["w"]})
    assert sum(v.size for v in jax.tree.leaves(with_feedback[1:])) == 2 * 9 * 2 + 2 + 9 * 6
    trion = sj.methods.dct_lowrank.scale_by_trion(2).init({"w": params["w"]})
    assert [v.size for v in jax.tree.leaves(trion[1:])] == [54]


def test_vectors_have_adam():
    gradients = [{"b": normal(6, seed=s)} for s in range(4)]
    made, _ = run(sj.methods.dct_lowrank.scale_by_dct_adam(2), gradients, gradients[0])
    expected, _ = run(optax.scale_by_adam(), gradients, gradients[0])
    np.testing.assert_allclose(made[-1]["b"], expected[-1]["b"], rtol=1e-5)


def test_stacked_layers_are_layers_alone_and_kernels_are_matrices():
    roles = {"stacked": Role.dense((1,), (2,), (0,)), "conv": Role.conv()}
    shapes = {"stacked": (3, 6, 4), "conv": (2, 2, 3, 5)}
    gradients = [{n: normal(*s, seed=7 * i + len(n)) for n, s in shapes.items()} for i in range(5)]
    for make in (sj.methods.dct_lowrank.scale_by_dct_adam, sj.methods.dct_lowrank.scale_by_trion):
        made, _ = run(make(2, roles=roles), gradients, gradients[0])
        for layer in range(3):
            alone = [{"w": g["stacked"][layer]} for g in gradients]
            expected, _ = run(make(2), alone, alone[0])
            np.testing.assert_allclose(made[-1]["stacked"][layer], expected[-1]["w"], rtol=2e-3, atol=1e-4)
        flat = [{"w": g["conv"].reshape(12, 5)} for g in gradients]
        expected, _ = run(make(2), flat, flat[0])
        np.testing.assert_allclose(made[-1]["conv"].reshape(12, 5), expected[-1]["w"], rtol=2e-3, atol=1e-4)


def test_zero_gradients_give_zero_updates():
    zero = {"w": jnp.zeros((6, 4)), "b": jnp.zeros(4)}
    for optimizer in (sj.methods.dct_lowrank.scale_by_dct_adam(2), sj.methods.dct_lowrank.scale_by_trion(2)):
        made, _ = run(optimizer, [zero, zero], zero)
        assert all(not np.asarray(v).any() for v in jax.tree.leaves(made))


def test_trion_of_full_rank_is_muon():
    gradients = [normal(6, 4, seed=s) for s in range(4)]
    made, state = run(
        sj.methods.dct_lowrank.scale_by_trion(4, scale="none"), [{"w": g} for g in gradients], {"w": gradients[0]}
    )
    momentum = jnp.zeros((6, 4))
    for gradient, one in zip(gradients, made, strict=True):
        whole = momentum + gradient
        np.testing.assert_allclose(one["w"], newton_schulz(whole), rtol=1e-3, atol=1e-3)
        momentum = 0.95 * whole
    np.testing.assert_allclose(state.momentum["w"], momentum, rtol=1e-3, atol=1e-4)


def test_newton_schulz_keeps_singular_vectors_and_evens_values():
    matrix = normal(3, 8, 5)
    made = newton_schulz(matrix)
    for one, other in zip(np.asarray(made), np.asarray(matrix), strict=True):
        u, _, vt = np.linalg.svd(other, full_matrices=False)
        inner = u.T @ one @ vt.T
        np.testing.assert_allclose(inner - np.diag(np.diag(inner)), 0.0, atol=2e-3)
        assert (np.abs(np.diag(inner) - 1) < 0.35).all()


@pytest.mark.parametrize(("scale", "factor"), [("kj", 2.0), ("kimi", 0.2 * np.sqrt(8)), ("dion", 2.0), ("none", 1.0)])
def test_trion_scales(scale, factor):
    gradient = {"w": normal(2, 8)}
    (plain,), _ = run(sj.methods.dct_lowrank.scale_by_trion(2, scale="none"), [gradient], gradient)
    (made,), _ = run(sj.methods.dct_lowrank.scale_by_trion(2, scale=scale), [gradient], gradient)
    np.testing.assert_allclose(made["w"], factor * plain["w"], rtol=1e-5)


def test_only_the_used_part_of_the_momentum_decays():
    gradient = normal(8, 5)
    optimizer = sj.methods.dct_lowrank.scale_by_trion(2)
    _, state = optimizer.update({"w": gradient}, optimizer.init({"w": gradient}))
    columns = chosen_columns(select_columns(gradient, 2).indices, 5)
    used = gradient @ columns @ columns.T
    np.testing.assert_allclose(state.momentum["w"], gradient - 0.05 * used, rtol=1e-4, atol=1e-5)


def test_bad_options_are_refused():
    with pytest.raises(RankError):
        sj.methods.dct_lowrank.scale_by_dct_adam(0)
    with pytest.raises(RankError):
        sj.methods.dct_lowrank.scale_by_trion(0)
    with pytest.raises(ValueError, match="'muon': expected one of 'kj'"):
        sj.methods.dct_lowrank.scale_by_trion(2, scale="muon")
