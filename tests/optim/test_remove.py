"""Subspaces that removers take out of updates, against projectors of numpy and against `sandwich`."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import PatternError, Role, RoleError, StructureError
from subspace_jax.linalg import make_remover
from subspace_jax.optim import remove_subspaces
from tests.tolerances import tolerance

IN, OUT = 12, 7


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def columns(size, rank, seed=1, stack=()):
    return np.linalg.qr(random(*stack, size, size, seed=seed))[0][..., :rank]


def run(optimizer, start, steps=30):
    """Parameters after steps with gradients drawn anew, in float32."""
    gradients = jnp.asarray(random(steps, *start.shape, seed=7) + 0.5 * random(*start.shape, seed=8), jnp.float32)
    params = {"w": jnp.asarray(start, jnp.float32)}

    @jax.jit
    def loop(params):
        def one(carry, g):
            updates, state = optimizer.update({"w": g}, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(one, (params, optimizer.init(params)), gradients)[0][0]

    return np.asarray(loop(params)["w"], np.float64)


def numpy_adam(start, project_gradient, project_update, steps=30, rate=0.01):
    gradients = random(steps, *start.shape, seed=7) + 0.5 * random(*start.shape, seed=8)
    w, mu, nu = np.array(start), np.zeros_like(start), np.zeros_like(start)
    for t, g in enumerate(gradients.astype(np.float32).astype(np.float64), 1):
        g = project_gradient(g)
        mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g * g
        w = w - rate * project_update(mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8))
    return w


@pytest.mark.parametrize("project_gradients", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 5, 6, 12])
@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_trains_as_adam_between_projectors_of_numpy(side, rank, project_gradients):
    start = random(IN, OUT, seed=3)
    bases = {"in": columns(IN, rank), "out": columns(OUT, min(rank, OUT), seed=2)}
    sides = ("in", "out") if side == "both" else (side,)

    def project(g):
        if "in" in sides:
            g = g - bases["in"] @ (bases["in"].T @ g)
        return g - (g @ bases["out"]) @ bases["out"].T if "out" in sides else g

    made = tuple(make_remover(jnp.asarray(bases[s], jnp.float32)) for s in sides)
    removers = {"w": made if side == "both" else made[0]}
    optimizer = remove_subspaces(optax.adam(0.01), removers, side, project_gradients=project_gradients)
    found = run(optimizer, start)
    everything = rank == 12 or (side != "in" and rank >= OUT)
    if not everything:  # where all is removed Adam of numpy makes steps of rounding
        expected = numpy_adam(start, project if project_gradients else lambda g: g, project)
        np.testing.assert_allclose(found, expected, atol=2e-4)
    change = found - start.astype(np.float32)
    if "in" in sides:
        np.testing.assert_allclose(bases["in"].T @ change, 0, atol=tolerance(size=30, norm=0.5))
    if "out" in sides:
        np.testing.assert_allclose(change @ bases["out"], 0, atol=tolerance(size=30, norm=0.5))
    assert (np.abs(change).max() > 0.01) == (not everything)


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("rank", [3, 9])
def test_does_what_sandwich_does(rank, stack):
    basis = jnp.asarray(columns(IN, rank, stack=stack), jnp.float32)
    roles = {"w": Role.dense(in_axes=(1,), out_axes=(2,), stack_axes=(0,))} if stack else None
    start = random(*stack, IN, OUT, seed=3)
    ours = run(remove_subspaces(optax.adam(0.01), {"w": make_remover(basis)}, roles=roles), start)
    np.testing.assert_allclose(ours, run(sj.sandwich(optax.adam(0.01), {"w": basis}, roles=roles), start), atol=1e-4)


@pytest.mark.parametrize("rank", [3, 12])
def test_a_gradient_of_removed_directions_moves_nothing(rank):
    """Rounding of a projection that Adam would give full steps."""
    basis = columns(IN, rank)
    optimizer = remove_subspaces(optax.adam(0.1), {"w": make_remover(jnp.asarray(basis, jnp.float32))})
    params = {"w": jnp.zeros((IN, OUT))}
    inside = {"w": jnp.asarray(100 * basis @ random(rank, OUT), jnp.float32)}
    updates: Any = optimizer.update(inside, optimizer.init(params), params)[0]
    np.testing.assert_array_equal(updates["w"], 0)


def test_with_nothing_to_remove_the_optimizer_is_left_alone():
    params = {"w": jnp.asarray(random(IN, OUT), jnp.bfloat16)}
    optimizer = remove_subspaces(optax.adam(0.1), {"w": make_remover(jnp.zeros((IN, 4)), 0)})
    ours, plain = ((o.update(params, o.init(params), params)[0]) for o in (optimizer, optax.adam(0.1)))
    chex.assert_trees_all_equal(ours, plain)


def test_removers_of_a_form_are_replaced_without_compiling_again():
    traces, params = [], {"w": jnp.zeros((IN, OUT))}
    removers = [{"w": make_remover(jnp.asarray(columns(IN, 3, seed), jnp.float32))} for seed in (1, 2)]
    optimizer = remove_subspaces(optax.sgd(1.0), removers[0])

    @jax.jit
    def step(gradient, state):
        traces.append(None)
        return optimizer.update(gradient, state)

    gradient = {"w": jnp.asarray(random(IN, OUT), jnp.float32)}
    _, state = step(gradient, optimizer.init(params))
    updates, _ = step(gradient, state._replace(removers=removers[1]))
    np.testing.assert_allclose(columns(IN, 3, 2).T @ np.asarray(updates["w"]), 0, atol=1e-5)
    assert len(traces) == 1


def test_bad_removers_are_refused_by_name():
    params, remover = {"w": jnp.zeros((IN, OUT))}, make_remover(jnp.eye(IN)[:, :2])
    with pytest.raises(PatternError, match="v: there is a remover for it"):
        remove_subspaces(optax.sgd(1.0), {"v": remover}).init(params)
    with pytest.raises(StructureError, match=r"w: the remover of side 'out' is of size 12 .*expected size 7"):
        remove_subspaces(optax.sgd(1.0), {"w": remover}, "out").init(params)
    stacked = make_remover(jnp.zeros((2, IN, 2)))
    with pytest.raises(StructureError, match=r"w: the remover of side 'in' .*\(2, 12, 2\)"):
        remove_subspaces(optax.sgd(1.0), {"w": stacked}).init(params)
    with pytest.raises(StructureError, match="w: got a Remover for side 'both'; expected a pair"):
        remove_subspaces(optax.sgd(1.0), {"w": remover}, "both").init(params)
    with pytest.raises(StructureError, match=r"w: got a .*Array.* for side 'in'; expected a remover"):
        remove_subspaces(optax.sgd(1.0), {"w": jnp.eye(IN)[:, :2]}).init(params)
    with pytest.raises(RoleError, match="w: shape"):
        remove_subspaces(optax.sgd(1.0), {"w": remover}).init({"w": jnp.zeros((2, IN, OUT))})
