"""ARO against NumPy's loop of its steps, and the special cases in which it is something known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax.core import StructureError
from subspace_jax.methods.optimizers.aro import aro, normalized_rows, orthogonal_factor, scale_by_aro, sinkhorn
from tests.tolerances import assert_rounding


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def single(x):
    return jnp.asarray(x, jnp.float32)


def base_of(name, x):
    m, n = x.shape
    if name == "sign":
        return np.sign(x)
    if name == "row":
        return np.sqrt(n) * x / np.linalg.norm(x, axis=1, keepdims=True)
    for _ in range(5):
        x = np.sqrt(n) * x / np.linalg.norm(x, axis=1, keepdims=True)
        x = np.sqrt(m) * x / np.linalg.norm(x, axis=0, keepdims=True)
    return x


def qr(a):
    q, r = np.linalg.qr(a)
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def loop(base, gradients, beta=0.95, b2=0.95):
    """The six steps in float64 on rows; Adam's rule with its second moment in rotated coordinates."""
    m, n = gradients[0].shape
    moved, rotation, second, made = np.zeros((m, n)), np.eye(m), np.zeros((m, n)), []
    for g in gradients:
        moved = beta * moved + (1 - beta) * g
        before = rotation.T @ moved
        if base == "adam":
            ahead = before / (np.sqrt(b2 * second + (1 - b2) * before**2) + 1e-8)
            rotation = qr(moved @ ahead.T)
            after = rotation.T @ moved
            second = b2 * second + (1 - b2) * after**2
            direction = after / (np.sqrt(second) + 1e-8)
        else:
            rotation = qr(moved @ base_of(base, before).T)
            direction = base_of(base, rotation.T @ moved)
        update = rotation @ direction
        made.append((0.2 * update / np.sqrt(np.mean(update**2)), rotation))
    return made


@pytest.mark.parametrize("base", ["sinkhorn", "row", "adam", "sign"])
@pytest.mark.parametrize("shape", [(4, 12), (12, 4)])
def test_three_steps_are_those_of_the_equations(base, shape):
    gradients = [normal(*shape, seed=s) for s in range(3)]
    turned = shape[0] > shape[1]
    expected = loop(base, [g.T if turned else g for g in gradients])
    optimizer = scale_by_aro(base=base)
    params = {"w": jnp.zeros(shape)}
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for g, (update, rotation) in zip(gradients, expected, strict=True):
        found, state = step({"w": single(g)}, state)
        assert_rounding(state.matrices["rotation"]["w"], rotation, size=4096)
        if base != "sign":  # signs of what is exactly zero after a QR are rounding
            assert_rounding(found["w"], update.T if turned else update, size=4096)
    assert step._cache_size() == 1


def test_a_stack_is_its_layers_and_sides_can_be_named():
    g = normal(3, 4, 6)
    from subspace_jax.core import Role

    roles = {"w": Role.dense((1,), (2,), (0,))}
    whole = scale_by_aro(roles=roles)
    found, _ = whole.update({"w": single(g)}, whole.init({"w": single(g)}))
    one = scale_by_aro()
    for i in range(3):
        alone, _ = one.update({"w": single(g[i])}, one.init({"w": single(g[i])}))
        assert_rounding(found["w"][i], alone["w"], size=64)
    named = scale_by_aro(sides={"**/out/*": "out"}, roles=roles)
    state = named.init({"a": {"out": {"w": jnp.zeros((4, 6))}}, "b": jnp.zeros((4, 6))})
    assert state.matrices["rotation"]["a"]["out"]["w"].shape == (6, 6)
    assert state.matrices["rotation"]["b"].shape == (4, 4)


@pytest.mark.parametrize("base", ["sinkhorn", "adam"])
def test_matrices_of_a_group_share_the_rotation_of_their_momenta_side_by_side(base):
    """Against NumPy: one rotation from the momenta joined along columns; the rule and the size are each matrix's."""
    reads, writes, alone = (4, 6), (9, 4), (4, 5)
    shapes = {"one": {"up": reads, "down": writes}, "other": alone}
    sides = {"**/down": "out", "**": "in"}
    optimizer = scale_by_aro(base=base, sides=sides, group_fn=lambda path: path.split("/")[0] if "/" in path else None)
    zeros = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda v: isinstance(v, tuple))
    state, step = optimizer.init(zeros), jax.jit(optimizer.update)
    moved, second = {n: 0.0 for n in ("up", "down")}, {n: 0.0 for n in ("up", "down")}
    rotation = np.eye(4)
    for seed in range(3):
        g = {
            "up": normal(*reads, seed=seed),
            "down": normal(*writes, seed=9 + seed),
            "other": normal(*alone, seed=seed),
        }
        found, state = step({"one": {n: single(g[n]) for n in ("up", "down")}, "other": single(g["other"])}, state)
        oriented = {"up": g["up"], "down": g["down"].T}
        moved = {n: 0.95 * moved[n] + 0.05 * oriented[n] for n in moved}
        before = {n: rotation.T @ m for n, m in moved.items()}
        if base == "adam":
            ahead = {n: v / (np.sqrt(0.95 * second[n] + 0.05 * v**2) + 1e-8) for n, v in before.items()}
        else:
            ahead = {n: base_of(base, v) for n, v in before.items()}
        rotation = qr(np.hstack(list(moved.values())) @ np.hstack(list(ahead.values())).T)
        for name, m in moved.items():
            after = rotation.T @ m
            if base == "adam":
                second[name] = 0.95 * second[name] + 0.05 * after**2
                direction = after / (np.sqrt(second[name]) + 1e-8)
            else:
                direction = base_of(base, after)
            update = rotation @ direction
            update *= 0.2 / np.sqrt(np.mean(update**2))
            assert_rounding(found["one"][name], update.T if name == "down" else update, size=4096)
            assert_rounding(state.matrices["rotation"]["one"][name], rotation, size=4096)
    single_one = scale_by_aro(base=base, sides=sides)
    kept = single_one.init({"other": zeros["other"]})
    for seed in range(3):
        expected, kept = single_one.update({"other": single(normal(*alone, seed=seed))}, kept)
    assert_rounding(found["other"], expected["other"], size=64)
    assert step._cache_size() == 1


def test_a_group_of_unequal_sides_is_refused_by_path():
    optimizer = scale_by_aro(group_fn=lambda path: "all")
    g = {"a": single(normal(4, 6)), "b": single(normal(5, 6))}
    with pytest.raises(StructureError, match=r"^b: aro: group 'all' rotates a side of 5 here .* 4 in a .*sides="):
        optimizer.update(g, optimizer.init(g))


def test_sinkhorn_gives_equal_norms_and_knows_no_scale():
    x = normal(20, 30)
    found = np.asarray(sinkhorn(single(x)), np.float64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.sqrt(30), rtol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), np.sqrt(20), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found), np.sqrt(600), rtol=1e-5)
    assert_rounding(sinkhorn(single(7 * x)), found, size=64)
    assert_rounding(sinkhorn(single(-x)), -found, size=64)
    order, flips = np.random.default_rng(1).permutation(20), np.random.default_rng(2).choice([-1.0, 1.0], 20)
    assert_rounding(sinkhorn(single(flips[:, None] * x[order])), flips[:, None] * found[order], size=64)
    other = np.asarray(sinkhorn(single(x), 40, simultaneous=True), np.float64)
    ratio = other / found
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=2e-3)


def test_rotations_are_orthogonal_for_any_gradient_and_noise_is_not_blown_up():
    rank_one = np.outer(normal(6), normal(8, seed=1))
    for g in (rank_one, np.zeros((6, 8)), np.eye(6, 8), normal(6, 8)):
        for factorization in ("householder", "cholesky"):
            optimizer = scale_by_aro(factorization=factorization)
            state = optimizer.init({"w": jnp.zeros((6, 8))})
            for _ in range(3):
                found, state = optimizer.update({"w": single(g)}, state)
                r = np.asarray(state.matrices["rotation"]["w"], np.float64)
                np.testing.assert_allclose(r.T @ r, np.eye(6), atol=1e-5)
            size = 0.2 * np.sqrt(48) if np.any(g) else 0.0
            np.testing.assert_allclose(np.linalg.norm(found["w"]), size, rtol=1e-5)
    optimizer = scale_by_aro(base="row")
    found, _ = optimizer.update({"w": single(rank_one)}, optimizer.init({"w": jnp.zeros((6, 8))}))
    values = np.linalg.svd(np.asarray(found["w"], np.float64), compute_uv=False)
    assert values[1] < 1e-4 * values[0]  # rounding of a matrix of rank one stays rounding


def test_rows_of_a_fixed_momentum_end_in_the_polar_factor():
    m = normal(5, 9)
    u, _, vt = np.linalg.svd(m, full_matrices=False)
    optimizer = scale_by_aro(base="row", beta=0.0)

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda s, _: optimizer.update({"w": single(m)}, s)[::-1], state, None, length=400)[1]

    found = np.asarray(run(optimizer.init({"w": single(m)}))["w"][-1], np.float64)
    polar = u @ vt
    np.testing.assert_allclose(found / np.linalg.norm(found), polar / np.linalg.norm(polar), atol=2e-5)


def test_it_turns_with_its_coordinates():
    m, turn = normal(4, 10), np.linalg.qr(normal(4, 4, seed=3))[0]
    expected = loop("sinkhorn", [m])[0]
    before = qr(turn @ m @ base_of("sinkhorn", m).T)
    np.testing.assert_allclose(before, turn @ expected[1], atol=1e-10)
    optimizer = scale_by_aro(beta=0.0)
    state = optimizer.init({"w": jnp.zeros((4, 10))})
    started = {"rotation": {"w": single(turn)}, "momentum": state.matrices["momentum"]}
    found, new = optimizer.update({"w": single(turn @ m)}, state._replace(matrices=started))
    assert_rounding(new.matrices["rotation"]["w"], turn @ expected[1], size=1024)
    assert_rounding(found["w"], turn @ expected[0], size=1024)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_cholesky_gives_the_factor_of_householder(scale):
    u, vt = (np.linalg.qr(normal(7, 7, seed=s))[0] for s in (0, 1))
    a = scale * u @ np.diag(np.geomspace(1.0, 1e-2, 7)) @ vt
    np.testing.assert_allclose(orthogonal_factor(single(a), "cholesky"), qr(a), atol=2e-4)
    np.testing.assert_allclose(orthogonal_factor(single(a)), qr(a), atol=2e-4)
    singular = single(np.stack([a, np.outer(a[0], a[1]), np.zeros((7, 7))]))
    found = np.asarray(orthogonal_factor(singular, "cholesky"))
    np.testing.assert_allclose(np.swapaxes(found, 1, 2) @ found, np.stack([np.eye(7)] * 3), atol=1e-4)


def test_what_is_no_matrix_has_adam_and_large_matrices_too():
    params = {"v": jnp.ones(3), "table": jnp.ones((20, 4)), "w": jnp.ones((4, 4))}
    gradient = jax.tree.map(lambda v: single(normal(*v.shape)), params)
    optimizer = aro(0.1, weight_decay=0.1, largest=10)
    reference = optax.adamw(0.1, 0.9, 0.95, 1e-8, weight_decay=0.1)
    found, _ = optimizer.update(gradient, optimizer.init(params), params)
    expected, _ = reference.update(gradient, reference.init(params), params)
    for name in ("v", "table"):
        assert_rounding(found[name], expected[name], size=64)
    assert normalized_rows(jnp.zeros((2, 3))).tolist() == [[0.0] * 3] * 2


def test_refusals():
    for options in ({"base": "polar"}, {"factorization": "svd"}, {"sides": {"w": "rows"}}):
        with pytest.raises(ValueError, match="expected"):
            scale_by_aro(**options)
