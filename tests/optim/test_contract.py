"""What every gradient transformation promises, checked for every one on every kind of leaf."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax.core import leaves_with_paths

from .contract import CASES, bases, make_tree, matrices, rest

RATE = 0.05


# Of module scope so that pytest runs all checks of one transformation together, and what they share is compiled once.
@pytest.fixture(params=CASES, ids=lambda case: case.name, scope="module")
def case(request):
    return request.param


@functools.cache
def step(case):
    """The optimizer, one compiled step of parameters, state and gradient, and the list that notes its traces."""
    optimizer, traces = case.make(RATE), []

    @jax.jit
    def run(params, state, gradient):
        traces.append(None)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, updates

    return optimizer, run, traces


@functools.cache
def initial(case):
    return jax.jit(step(case)[0].init)(make_tree())


@functools.cache
def first_updates(case, seed=1):
    return step(case)[1](make_tree(), initial(case), make_tree(seed))[2]


def assert_close(actual, expected, tolerance=1e-5):
    """Compares two trees leaf by leaf, relative to each leaf's largest entry."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        wide = 2e-2 if a.dtype == jnp.bfloat16 else tolerance
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max(initial=0.0)
        assert error <= wide * max(np.abs(b).max(initial=0.0), 1e-2), f"{jax.tree_util.keystr(path)}: {error}"


def part(case, path, matrix):
    """What of a matrix lies in the directions that the case learns in, in float64."""
    if case.learns == "everything" or path not in bases():
        return matrix
    u = np.asarray(bases()[path], np.float64)
    inside = u @ (np.swapaxes(u, -1, -2) @ matrix)
    return inside if case.learns == "subspace" else matrix - inside


def train(case, gradient, steps, rate=0.2):
    """Parameters after steps with a learning rate that falls to zero by a schedule, in one compiled loop."""
    optimizer = case.make(optax.cosine_decay_schedule(rate, steps))
    params = make_tree()

    @jax.jit
    def run(params):
        def one(carry, _):
            params, state = carry
            updates, state = optimizer.update(gradient(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, optimizer.init(params)), None, length=steps)[0][0]

    return params, run(params)


def check_reached(case, start, end, gradient, what):
    """The gradient of what learns is gone, what does not learn has not moved."""
    for tree, found in ((matrices, matrices(gradient(end))), (rest, rest(gradient(end)))):
        before = tree(gradient(start))
        for path, left in found.items():
            size = np.abs(part(case, path, before[path])).max()
            error = np.abs(part(case, path, left)).max() / size
            assert error < (0.05 if path == "bfloat16" else 0.02), f"{what} {path}: {error} of the gradient is left"
    for path, moved in matrices(jax.tree.map(lambda a, b: b.astype(jnp.float32) - a, start, end)).items():
        if case.learns is not None and path != "bfloat16":
            outside = moved - part(case, path, moved)
            assert np.abs(outside).max() <= 1e-5 * np.abs(moved).max(), f"{what} {path} left its subspace"


def test_converges_on_a_quadratic(case):
    target = make_tree(1)
    gradient = lambda params: jax.tree.map(lambda p, t: p - t, params, target)
    start, end = train(case, gradient, 200)
    if case.converges:
        check_reached(case, start, end, gradient, "quadratic")
    else:
        sizes = [sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(gradient(p))) for p in (start, end)]
        assert sizes[1] < 0.9 * sizes[0]


def test_converges_on_least_squares(case):
    """Each leaf has inputs of its own along its last axis, so that entries depend on each other."""
    rng, target = np.random.default_rng(2), make_tree(1)

    def hessian(leaf):
        x = rng.normal(size=(4 * leaf.shape[-1], leaf.shape[-1]))
        return jnp.asarray(x.T @ x / len(x), jnp.float32)

    hessians = [hessian(leaf) for leaf in jax.tree.leaves(target)]

    def gradient(params):
        leaves, treedef = jax.tree.flatten(jax.tree.map(lambda p, t: p - t, params, target))
        return jax.tree.unflatten(treedef, [(g @ h).astype(g.dtype) for g, h in zip(leaves, hessians, strict=True)])

    start, end = train(case, gradient, 400)
    if case.converges:
        check_reached(case, start, end, gradient, "least squares")


def test_state_and_updates_keep_structure_shapes_and_dtypes_and_nothing_compiles_again(case):
    optimizer, run, traces = step(case)
    params = make_tree()
    state = initial(case)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(optimizer.init, params), state)
    before, old = params, state
    for seed in (1, 2):
        params, state, updates = run(params, state, make_tree(seed))
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, before)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, old)
        assert jax.tree.structure(updates) == jax.tree.structure(before)
    assert len(traces) == 1
    for path, update in leaves_with_paths(updates):
        if update is not None and path != "loca":
            assert all(np.abs(np.asarray(v, np.float32)).max() > 0 for v in jax.tree.leaves(update)), path


def test_takes_a_rate_from_outside_and_other_arguments(case):
    """`inject_hyperparams` with a schedule gives the first step what the number gives."""
    schedule = optax.linear_schedule(RATE, 0.0, 4)
    injected = optax.inject_hyperparams(lambda rate: case.make(rate))(rate=schedule)
    optimizer = optax.with_extra_args_support(injected)
    params = make_tree()
    run = jax.jit(lambda g, s, p: optimizer.update(g, s, p, value=1.0, unknown=jnp.ones(2)))
    updates, _ = run(make_tree(1), jax.jit(optimizer.init)(params), params)
    # A rate that is an array in float32 widens what it multiplies.
    assert_close(jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params), first_updates(case))


def test_accumulated_steps_are_one_step_of_the_mean_gradient_and_nan_leaves_no_trace(case):
    optimizer, run, _ = step(case)
    params = make_tree()
    several = optax.apply_if_finite(optax.MultiSteps(optimizer, 2).gradient_transformation(), 3)
    update = jax.jit(several.update)
    state = jax.jit(several.init)(params)
    one, two = make_tree(1), make_tree(2)
    for gradient in (one, one | {"matrix": jnp.full((12, 8), jnp.nan)}):
        still, state = update(gradient, state, params)
        assert not any(np.asarray(v, np.float32).any() for v in jax.tree.leaves(still))
    updates, _ = update(two, state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, two)
    assert_close(updates, run(params, initial(case), mean)[2], 1e-4)


def test_shares_a_tree_with_other_optimizers(case):
    """Masked leaves go to SGD; the others get what they get without it."""
    optimizer = step(case)[0]
    params = make_tree()
    labels = {name: "other" if name in ("conv", "vector", "full") else "ours" for name in params}
    split = optax.multi_transform({"ours": optimizer, "other": optax.sgd(1.0)}, labels)
    updates, _ = jax.jit(split.update)(make_tree(1), jax.jit(split.init)(params), params)
    expected = first_updates(case)
    for name, label in labels.items():
        wanted = expected[name] if label == "ours" else jax.tree.map(jnp.negative, make_tree(1)[name])
        assert_close(updates[name], wanted)


def test_vmap_over_runs_gives_the_same(case):
    optimizer = step(case)[0]
    params = make_tree()
    gradients = jax.tree.map(lambda *v: jnp.stack(v), make_tree(1), make_tree(2))
    updates, _ = jax.jit(jax.vmap(optimizer.update, (0, None, None)))(gradients, initial(case), params)
    for i in (0, 1):
        assert_close(jax.tree.map(lambda v, i=i: v[i], updates), first_updates(case, i + 1), 1e-4)


def test_state_can_be_told_from_parameters(case):
    """`optax.tree.map_params` finds what of a state is like the parameters, as sharding by parameters needs it."""
    optimizer = step(case)[0]
    if case.name == "alternating":
        pytest.skip("its parts are states of parts of the parameters")
    state = initial(case)
    same = optax.tree.map_params(optimizer, lambda v: v, state)
    chex.assert_trees_all_equal(same, state)
