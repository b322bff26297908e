"""GaLore and fixed subspaces: against numpy, the authors' package, optax.contrib, and one matrix at a time."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core as jax_core
from optax import contrib

import subspace_jax as sj
from subspace_jax.core import PatternError, RankError, Role, StructureError
from tests.tolerances import tolerance

SHAPES = [(12, 5), (5, 12), (8, 8)]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def columns(size, rank, seed=1):
    return jnp.asarray(np.linalg.qr(random(size, rank, seed=seed))[0])


def numpy_adam(gradients, b1=0.9, b2=0.999, eps=1e-8):
    """Adam's directions for a list of gradients, in float64."""
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        g = np.asarray(g, np.float64)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def updates_of(transform, gradients):
    def step(state, g):
        updates, state = transform.update({"w": g}, state)
        return state, updates["w"]

    run = jax.jit(lambda gs: jax.lax.scan(step, transform.init({"w": jnp.zeros_like(gs[0])}), gs))
    state, found = run(jnp.asarray(np.stack(gradients)))
    return list(np.asarray(found)), state


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_rank_is_adam_in_the_first_singular_basis(shape):
    gradients = random(6, *shape)
    found, _ = updates_of(sj.optim.in_subspace(optax.scale_by_adam(), rank=99, every=1000), gradients)
    u, _, vt = np.linalg.svd(gradients[0].astype(np.float64), full_matrices=False)
    if shape[0] <= shape[1]:
        expected = [u @ d for d in numpy_adam([u.T @ g for g in gradients])]
    else:
        expected = [d @ vt for d in numpy_adam([g @ vt.T for g in gradients])]
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["shorter", "longer", "in", "out"])
def test_rank_of_updates_and_shapes_of_the_state(shape, side):
    rank = 2
    found, state = updates_of(
        sj.optim.in_subspace(optax.scale_by_adam(), rank=rank, every=4, side=side), random(8, *shape)
    )
    for part in (found[:4], found[4:]):
        assert np.linalg.matrix_rank(np.sum(part, 0), tol=1e-4) == rank
    assert np.linalg.matrix_rank(np.sum(found, 0), tol=1e-4) > rank
    first = {"shorter": shape[0] <= shape[1], "longer": shape[0] >= shape[1]}.get(side, side == "in")
    size, other = shape if first else shape[::-1]
    moments = (rank, other) if first else (other, rank)
    assert state.basis["w"].shape == (size, rank)
    assert state.inner.mu["w"].shape == state.inner.nu["w"].shape == moments
    if side == "shorter":
        floats = sum(v.size for v in jax.tree.leaves(state) if v.dtype == jnp.float32)
        assert floats == 2 * rank * max(shape) + min(shape) * rank


def test_rank_is_at_most_the_shorter_side():
    state = sj.optim.in_subspace(optax.scale_by_adam(), rank=99).init({"w": jnp.zeros((12, 5))})
    assert state.basis["w"].shape == (5, 5)


@pytest.mark.parametrize("shape", [(32, 8), (8, 32), (8, 8)])
def test_longer_side_is_optax(shape):
    gradients = random(7, *shape)
    ours, _ = updates_of(
        sj.optim.in_subspace(optax.scale_by_adam(), rank=3, every=3, side="longer", scale=0.25), gradients
    )
    theirs, _ = updates_of(contrib.scale_by_galore(3, 3, 0.25), gradients)
    # Singular vectors may have other signs, to which Adam is blind until moments are carried over a refresh.
    np.testing.assert_allclose(ours[:3], theirs[:3], atol=1e-4)
    one_basis = (
        sj.optim.in_subspace(optax.scale_by_adam(), rank=3, every=99, side="longer"),
        contrib.scale_by_galore(3, 99),
    )
    ours, theirs = (updates_of(t, gradients)[0] for t in one_basis)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@functools.cache
def authors_adam():
    """The module of Adam in the authors' package; the package itself also wants 8-bit optimizers."""
    spec = importlib.util.find_spec("galore_torch")
    if spec is None:
        pytest.skip("galore-torch is not installed")
    package = types.ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault("galore_torch", package)
    return pytest.importorskip("galore_torch.adamw")


@pytest.mark.interop
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_shorter_side_is_the_authors_package(shape, decay):
    """Their weights are (out, in); their Adam adds epsilon before the bias is corrected."""
    torch, authors = pytest.importorskip("torch"), authors_adam()
    rank, every, scale, rate, start, gradients = 3, 99, 0.25, 1e-2, random(*shape, seed=3), random(8, *shape)
    weight = torch.nn.Parameter(torch.tensor(start.T.copy()))
    group = {"params": [weight], "rank": rank, "update_proj_gap": every, "scale": scale, "proj_type": "std"}
    theirs = authors.AdamW([group], lr=rate, weight_decay=decay, eps=1e-3, no_deprecation_warning=True)
    inner = sj.methods.lift.scale_by_lift_adam(0.9, 0.999, 1e-3, eps_mode="hf")
    ours = optax.chain(
        sj.optim.in_subspace(inner, rank=rank, every=every, scale=scale),
        optax.add_decayed_weights(decay),
        optax.scale(-rate),
    )
    params = {"w": jnp.asarray(start)}
    state = ours.init(params)
    for g in gradients:
        weight.grad = torch.tensor(g.T.copy())
        theirs.step()
        updates, state = ours.update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
    # They decay what the step gave, which differs by rate² decay.
    np.testing.assert_allclose(params["w"], weight.detach().numpy().T, atol=tolerance(size=4) if decay == 0 else 2e-4)


@pytest.mark.parametrize("moments", ["carry", "reset", "transport"])
@pytest.mark.parametrize("side", ["in", "out"])
def test_moments_over_a_refresh(moments, side):
    gradients = random(4, 9, 6)
    transform = sj.optim.in_subspace(optax.scale_by_adam(), rank=3, every=3, side=side, moments=moments)
    found, state = updates_of(transform, gradients)
    _, before = updates_of(transform, gradients[:3])

    def basis(g, state):
        u, _, vt = np.linalg.svd(g.astype(np.float64))
        vectors = u[:, :3] if side == "in" else vt[:3].T
        mine = np.asarray(state.basis["w"])
        np.testing.assert_allclose(np.abs(vectors.T @ mine), np.eye(3), atol=1e-4)
        return mine.astype(np.float64)

    old, new = basis(gradients[0], before), basis(gradients[3], state)
    c = new.T @ gradients[3] if side == "in" else (gradients[3] @ new).T  # coordinates first, whichever side
    m, v = (np.asarray(x["w"], np.float64) for x in (before.inner.mu, before.inner.nu))
    m, v = (x if side == "in" else x.T for x in (m, v))
    if moments == "reset":
        m, v = 0 * m, 0 * v
    elif moments == "transport":
        r = new.T @ old
        m, v = r @ m, (r * r) @ v
    m, v = 0.9 * m + 0.1 * c, 0.999 * v + 0.001 * c * c
    direction = m / (1 - 0.9**4) / (np.sqrt(v / (1 - 0.999**4)) + 1e-8)
    expected = new @ direction if side == "in" else (new @ direction).T
    np.testing.assert_allclose(found[3], expected, atol=2e-4)


@pytest.mark.parametrize("steps", [1, 2001])
def test_after_a_reset_adams_step_has_three_times_its_size(steps):
    """The count that corrects the bias stays, as other leaves need it."""
    transform = sj.optim.in_subspace(optax.scale_by_adam(), rank=1, every=2000, moments="reset")
    g, w = {"w": jnp.outer(jnp.eye(4)[0], jnp.ones(6))}, {"w": jnp.zeros((4, 6))}

    def step(state, _):
        updates, state = transform.update(g, state)
        return state, jnp.linalg.norm(updates["w"])

    _, sizes = jax.lax.scan(step, transform.init(w), None, length=steps)
    expected = 1.0 if steps == 1 else 0.1 / np.sqrt(0.001 / (1 - 0.999**2001))
    np.testing.assert_allclose(sizes[-1], expected * np.sqrt(6), rtol=1e-3)


def test_the_decomposition_is_under_a_condition():
    transform = sj.optim.in_subspace(optax.scale_by_adam(), rank=2)
    g = {"w": jnp.ones((4, 6))}
    jaxpr = jax.make_jaxpr(transform.update)(g, transform.init(g)).jaxpr

    def count(jaxpr, inside=False):
        found = [0, 0]
        for eqn in jaxpr.eqns:
            found[inside] += eqn.primitive.name == "svd"
            for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
                sub = getattr(sub, "jaxpr", sub)
                if isinstance(sub, jax_core.Jaxpr):
                    deeper = count(sub, inside or eqn.primitive.name == "cond")
                    found = [a + b for a, b in zip(found, deeper, strict=True)]
        return found

    assert count(jaxpr) == [0, 1]


def test_randomized_finds_the_subspace_of_a_low_rank_gradient():
    low = random(40, 3) @ random(3, 30, seed=1)
    exact, randomized = (
        updates_of(sj.optim.in_subspace(optax.trace(0.9), rank=3, decomposition=d, seed=5), [low, low])[0]
        for d in ("exact", "randomized")
    )
    np.testing.assert_allclose(exact, randomized, atol=1e-4 * np.abs(low).max())
    np.testing.assert_allclose(exact[0], low, atol=1e-4 * np.abs(low).max())


def test_matrices_of_a_stack_and_of_other_forms_go_as_they_would_alone():
    shapes = {"stacked": (3, 6, 4), "conv": (2, 2, 3, 5), "heads": (6, 2, 4)}
    roles = {
        "stacked": Role.dense(in_axes=(1,), out_axes=(2,), stack_axes=(0,)),
        "conv": Role.conv(),
        "heads": Role.dense(in_axes=(0,), out_axes=(1, 2)),
    }
    gradients = [{n: jnp.asarray(random(*s, seed=t)) for n, s in shapes.items()} for t in range(3)]
    make = lambda **options: sj.optim.in_subspace(
        optax.scale_by_adam(), rank=2, every=2, moments="transport", **options
    )
    transform = make(roles=roles)
    state, update = jax.jit(transform.init)(gradients[0]), jax.jit(transform.update)
    for g in gradients:
        updates, state = update(g, state)

    def alone(matrices):
        return updates_of(make(), [np.asarray(m) for m in matrices])[0][-1]

    for i in range(3):
        expected = alone([g["stacked"][i] for g in gradients])
        np.testing.assert_allclose(updates["stacked"][i], expected, atol=2e-4)
    for name, shape in (("conv", (12, 5)), ("heads", (6, 8))):
        expected = alone([g[name].reshape(shape) for g in gradients])
        np.testing.assert_allclose(updates[name].reshape(shape), expected, atol=2e-4)


def test_what_has_no_subspace_goes_to_the_same_optimizer_in_full():
    tree = {"kernel": jnp.asarray(random(6, 4)), "other": jnp.asarray(random(6, 4)), "bias": jnp.asarray(random(4))}
    transform = sj.optim.in_subspace(optax.scale_by_adam(), rank=2, select="kernel", scale=0.25)
    updates, state = transform.update(tree, transform.init(tree))
    adam, _ = optax.scale_by_adam().update(tree, optax.scale_by_adam().init(tree))
    for name in ("other", "bias"):
        np.testing.assert_array_equal(updates[name], adam[name])
        assert state.basis[name] == optax.MaskedNode()
    assert np.abs(np.linalg.svd(np.asarray(updates["kernel"]))[1][2:]).max() < tolerance(size=4)
    with pytest.raises(PatternError, match="'kernal' matches no leaf"):
        sj.optim.in_subspace(optax.scale_by_adam(), rank=2, select="kernal").init(tree)


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_fixed_subspace_and_its_complement(side):
    gradients, u = random(5, 9, 6), columns(9 if side == "in" else 6, 3)
    wide = np.asarray(u, np.float64)
    turn = (lambda g: g) if side == "in" else (lambda g: g.T)
    found, _ = updates_of(sj.optim.in_subspace(optax.scale_by_adam(), {"w": u}, side=side), gradients)
    expected = [turn(wide @ d) for d in numpy_adam([wide.T @ turn(g) for g in gradients])]
    np.testing.assert_allclose(found, expected, atol=1e-4)

    transform = sj.optim.in_complement(optax.scale_by_adam(), {"w": u}, side)
    found, state = updates_of(transform, gradients)
    rest = np.asarray(state.basis["w"], np.float64)
    np.testing.assert_allclose(rest @ rest.T + wide @ wide.T, np.eye(len(wide)), atol=tolerance(size=4))
    expected = [turn(rest @ d) for d in numpy_adam([rest.T @ turn(g) for g in gradients])]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert max(np.abs(wide.T @ turn(f)).max() for f in found) < 1e-5


def test_zero_columns_of_a_basis_change_nothing():
    gradients, u = random(4, 9, 6), columns(9, 3)
    padded = jnp.concatenate([u, jnp.zeros((9, 2))], -1)
    one, other = (updates_of(sj.optim.in_subspace(optax.scale_by_adam(), {"w": b}), gradients)[0] for b in (u, padded))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_factors_of_stand_in_weights():
    """A given subspace of the inputs is the first factor's; without one the rule goes by the factors' own shapes."""
    adapted = sj.adapt({"w": jnp.zeros((9, 6))}, {"w": sj.lora(4)}, key=jax.random.key(0))
    trainable, _ = sj.partition(adapted)
    g = jax.tree.map(lambda v: jnp.asarray(random(*v.shape)), trainable)
    u = columns(9, 3)
    transform = sj.optim.in_subspace(optax.identity(), {"w": u})
    updates, state = transform.update(g, transform.init(trainable))
    assert state.basis["w"].b == optax.MaskedNode()
    np.testing.assert_array_equal(updates["w"].b, g["w"].b)
    np.testing.assert_allclose(updates["w"].a, u @ (u.T @ g["w"].a), atol=1e-5)
    state = sj.optim.in_subspace(optax.scale_by_adam(), rank=2).init(trainable)
    assert state.basis["w"].a.shape == (4, 2)
    assert state.inner.mu["w"].a.shape == (9, 2)


@pytest.mark.parametrize("inner", [optax.adamw(1e-3), optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio())])
def test_an_optimizer_that_needs_parameters_is_refused_with_the_mend(inner):
    params = {"w": jnp.ones((4, 6))}
    for options in ({"rank": 2}, {"basis": {"w": columns(4, 2)}}):
        with pytest.raises(ValueError, match=r"needs the parameters.*scale_by_adam.*add_decayed_weights"):
            sj.optim.in_subspace(inner, **options).init(params)


def test_other_arguments_reach_the_inner_optimizer():
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    transform = sj.optim.in_subspace(inner, {"w": columns(4, 2)})
    g = {"w": jnp.asarray(random(4, 6))}
    one, two = (transform.update(g, transform.init(g), factor=f)[0]["w"] for f in (1.0, 2.0))
    np.testing.assert_allclose(two, 2 * one, rtol=tolerance())
    with pytest.raises(TypeError, match="factor"):
        transform.update(g, transform.init(g))


def test_moments_that_are_not_like_parameters_stay():
    """SM3 keeps a list of rows and columns for each array."""
    found, _ = updates_of(
        sj.optim.in_subspace(optax.scale_by_sm3(), rank=3, every=2, moments="transport"), random(5, 9, 6)
    )
    assert np.isfinite(found).all()


def test_bad_options_are_refused():
    adam = optax.scale_by_adam()
    with pytest.raises(ValueError, match=r"either rank=.* or basis=.*neither"):
        sj.optim.in_subspace(adam)
    with pytest.raises(ValueError, match="both"):
        sj.optim.in_subspace(adam, {"w": columns(4, 2)}, rank=2)
    with pytest.raises(RankError, match="rank=0"):
        sj.optim.in_subspace(adam, rank=0)
    with pytest.raises(RankError, match=r"every=2.5"):
        sj.optim.in_subspace(adam, rank=2, every=2.5)
    with pytest.raises(ValueError, match="side='short'"):
        sj.optim.in_subspace(adam, rank=2, side="short")
    with pytest.raises(ValueError, match="side='shorter'"):
        sj.optim.in_subspace(adam, {"w": columns(4, 2)}, side="shorter")
    with pytest.raises(ValueError, match="moments='keep'"):
        sj.optim.in_subspace(adam, rank=2, moments="keep")
    with pytest.raises(ValueError, match="residual='sgd'"):
        sj.optim.in_subspace(adam, rank=2, residual="sgd")
    with pytest.raises(StructureError, match="other side"):
        sj.optim.in_subspace(adam, {"w": columns(6, 2)}).init({"w": jnp.zeros((4, 6))})
    with pytest.raises(StructureError, match="off orthonormal"):
        sj.optim.in_complement(adam, {"w": 2 * columns(4, 2)})


def test_galore_decays_weights_in_full_space():
    params = {"w": jnp.asarray(random(4, 6)), "b": jnp.ones(6)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = sj.galore(0.1, 2, weight_decay=0.5)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -0.05 * p, rtol=tolerance()), updates, params)
