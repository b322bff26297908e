"""What every gradient transformation promises, checked for every one on every kind of leaf."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import subspace_jax as sj
from subspace_jax.core import leaves_with_paths
from subspace_jax.weights import LowRank

from .contract import ALIASES, CASES, SHAPES, adapted, bases, make_tree, matrices, rest

RATE = 0.05
STATIC_SGD = ("renormalize_every",)
STIEFEL = {"matrix": sj.manifolds.Stiefel()}


# Of module scope so that pytest runs all checks of one transformation together, and what they share is compiled once.
@pytest.fixture(params=CASES, ids=lambda case: case.name, scope="module")
def case(request):
    return request.param


@functools.cache
def step(case):
    """The optimizer, one compiled step of parameters, state and gradient, and the list that notes its traces."""
    with jax.ensure_compile_time_eval():  # the first test that asks may be tracing
        optimizer, traces = case.make(RATE), []

    @jax.jit
    def run(params, state, gradient):
        traces.append(None)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, updates

    return optimizer, run, traces


def start_of(case):
    return make_tree(0, case.leaves)


def gradient_of(case, seed=1):
    return make_tree(seed, case.leaves)


@functools.cache
def initial(case):
    return jax.jit(step(case)[0].init)(start_of(case))


@functools.cache
def first_updates(case, seed=1):
    return step(case)[1](start_of(case), initial(case), gradient_of(case, seed))[2]


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
    """Parameters after steps with a rate that falls to zero, injected from outside, in one compiled loop."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    optimizer = optax.inject_hyperparams(lambda learning_rate: case.make(learning_rate))(schedule)
    params = start_of(case)

    @jax.jit
    def run(params):
        def one(carry, _):
            params, state = carry
            updates, state = optimizer.update(gradient(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, optimizer.init(params)), None, length=steps)[0][0]

    return params, run(params)


def check_reached(case, start, end, gradient):
    """The gradient of what learns is gone, what does not learn has not moved."""
    for tree, found in ((matrices, matrices(gradient(end))), (rest, rest(gradient(end)))):
        before = tree(gradient(start))
        for path, left in found.items():
            size = np.abs(part(case, path, before[path])).max()
            error = np.abs(part(case, path, left)).max() / size
            assert error < (0.05 if path == "bfloat16" else 0.02), f"{path}: {error} of the gradient is left"
    for path, moved in matrices(jax.tree.map(lambda a, b: b.astype(jnp.float32) - a, start, end)).items():
        if case.learns is not None and path != "bfloat16":
            outside = moved - part(case, path, moved)
            assert np.abs(outside).max() <= 1e-5 * np.abs(moved).max(), f"{path} left its subspace"


def test_converges_on_least_squares(case):
    """Each leaf has inputs of its own along its last axis, so that entries depend on each other."""
    rng, target = np.random.default_rng(2), gradient_of(case)

    def hessian(leaf):
        x = rng.normal(size=(4 * leaf.shape[-1], leaf.shape[-1]))
        return jnp.asarray(x.T @ x / len(x), jnp.float32)

    hessians = [hessian(leaf) for leaf in jax.tree.leaves(target)]

    def residual(params):
        leaves, treedef = jax.tree.flatten(jax.tree.map(lambda p, t: p - t, params, target))
        return jax.tree.unflatten(treedef, [(g @ h).astype(g.dtype) for g, h in zip(leaves, hessians, strict=True)])

    def of_products(params):
        """Gradients that belong to the product of two factors, which methods of both factors at once need."""
        found = residual(params)
        for name in case.leaves:
            if type(params[name]) is LowRank:
                goal = 0.1 * target[name].a @ target[name].b
                loss = lambda w, goal=goal: jnp.sum(jnp.square(w.a @ w.b - goal)) / 2
                found[name] = jax.grad(loss)(params[name])
        return found

    gradient = of_products if case.name.startswith("lora_pro") else residual
    start, end = train(case, gradient, 400)
    if case.converges:
        check_reached(case, start, end, gradient)
    else:
        sizes = [sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(gradient(p))) for p in (start, end)]
        assert sizes[1] < 0.9 * sizes[0]


def test_state_and_updates_keep_structure_shapes_and_dtypes_and_nothing_compiles_again(case):
    optimizer, run, traces = step(case)
    params = start_of(case)
    state = initial(case)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(optimizer.init, params), state)
    before, old = params, state
    for seed in (1, 2):
        params, state, updates = run(params, state, gradient_of(case, seed))
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, before)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, old)
        assert jax.tree.structure(updates) == jax.tree.structure(before)
    assert len(traces) == 1
    for path, update in leaves_with_paths(updates):
        if update is not None and path not in ("loca", "low_rank", "twin"):
            assert all(np.abs(np.asarray(v, np.float32)).max() > 0 for v in jax.tree.leaves(update)), path


def labels_of(case, name, leaf):
    """Of a whole leaf, or of every field of a stand-in; LoCA's coefficients go elsewhere than its locations."""
    if name in ("conv", "vector"):
        return "other"
    if name == case.absent:
        return "ours"
    labels = jax.tree.map(lambda _: "ours", leaf)
    return dataclasses.replace(labels, coefficients="other") if name == "loca" else labels


def test_shares_a_tree_and_leaves_what_has_no_gradient_or_no_entries(case):
    """Labels of leaves and of fields of stand-ins, an array without gradient, one without entries, in a FrozenDict."""
    empty = {"empty": jnp.zeros((0, 4))}
    params, gradient = start_of(case) | empty, gradient_of(case) | empty | {case.absent: None}
    labels = {name: labels_of(case, name, leaf) for name, leaf in params.items()}
    split = optax.multi_transform({"ours": step(case)[0], "other": optax.sgd(1.0)}, freeze(labels))

    @jax.jit
    def run(gradient, params):
        state = split.init(params)
        updates, new = split.update(gradient, state, params)
        return updates, state, new

    updates, state, new = run(freeze(gradient), freeze(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(state.inner_states["ours"], new.inner_states["ours"])
    others = jax.tree.map(np.negative, jax.device_get(gradient))
    expected = first_updates(case) | empty | {case.absent: None}
    expected |= {name: others[name] for name, label in labels.items() if label == "other"}
    if "loca" in expected:
        expected["loca"] = dataclasses.replace(expected["loca"], coefficients=others["loca"].coefficients)
    assert_close(dict(updates), expected)


def test_vmap_over_runs_gives_the_same(case):
    optimizer = step(case)[0]
    gradients = jax.tree.map(lambda *v: np.stack(v), *(jax.device_get(gradient_of(case, seed)) for seed in (1, 2)))
    updates, _ = jax.jit(jax.vmap(optimizer.update, (0, None, None)))(gradients, initial(case), start_of(case))
    updates = jax.device_get(updates)  # numpy takes its rows without a program for each shape
    for i in (0, 1):
        assert_close(jax.tree.map(lambda v, i=i: v[i], updates), first_updates(case, i + 1), 1e-4)


# What follows is traced and not compiled: what could go wrong there has another structure.


def test_is_traced_inside_what_wraps_optimizers(case):
    """With a schedule, other arguments, accumulated steps, and steps that are skipped."""
    inner = case.make(optax.linear_schedule(RATE, 0.0, 4))
    several = optax.MultiSteps(optax.with_extra_args_support(inner), 2).gradient_transformation()
    optimizer = optax.with_extra_args_support(optax.apply_if_finite(several, 3))
    params, gradient = start_of(case), gradient_of(case)

    def run(params, gradient):
        state = optimizer.init(params)
        return *optimizer.update(gradient, state, params, value=1.0, unknown=jnp.ones(2)), state

    updates, new, old = jax.eval_shape(run, params, gradient)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, old)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_is_traced_under_nnx(case):
    """The parameters have other paths when an `nnx.Optimizer` is made than when it updates."""
    if {"twin", "loca", "core", "rotated"} & set(case.leaves):
        pytest.skip("of stand-ins, which Flax takes apart")
    shapes = {name: jnp.zeros(SHAPES[name]) for name in case.leaves}

    def model_of(leaves):
        model = nnx.Module()
        for name, leaf in leaves.items():
            setattr(model, name, nnx.Param(leaf))
        return model

    def run(leaves):
        model = model_of(leaves)
        optimizer = nnx.Optimizer(model, step(case)[0], wrt=nnx.Param)
        for _ in range(2):
            optimizer.update(model, nnx.state(model_of(leaves), nnx.Param))
        return {name: getattr(model, name)[...] for name in leaves}

    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(run, shapes), shapes)


def test_state_can_be_told_from_parameters(case):
    """`optax.tree.map_params` finds what of a state is like the parameters, as sharding by parameters needs it."""
    state = initial(case)
    same = optax.tree.map_params(step(case)[0], lambda v: v, state)
    chex.assert_trees_all_equal(same, state)


@pytest.mark.parametrize(("alias", "direction"), ALIASES)
def test_an_alias_is_its_direction_with_decay_and_a_rate(alias, direction):
    names = ("low_rank", "matrix", "vector")
    params, one, two = (make_tree(seed, names) for seed in (0, 1, 2))
    chained = optax.chain(direction(), optax.add_decayed_weights(0.5), optax.scale_by_learning_rate(0.1))

    def run(optimizer):
        updates, state = optimizer.update(one, optimizer.init(params), params)
        return updates, optimizer.update(two, state, params)[0]

    for ours, theirs in zip(*jax.jit(lambda: (run(alias(0.1, 0.5)), run(chained)))(), strict=True):
        assert_close(ours, theirs)


NUMBERS = {"learning_rate": 0.1, "weight_decay": 0.1, "b1": 0.8, "b2": 0.9, "eps": 1e-6}
STATIC_ROOT = ("nesterov", "safe", "steps", "largest")
PAIR = {"learning_rate": 0.1, "weight_decay": 0.1, "delta": 1e-8}


@pytest.mark.parametrize(
    ("factory", "options", "static"),
    [
        (sj.galore, NUMBERS | {"rank": 2, "scale": 0.5}, ("rank", "every", "seed")),
        (sj.coso, NUMBERS | {"r1": 2, "r2": 2, "tasks": 2}, ("r1", "r2", "gap", "tasks")),
        (sj.scale_by_coso, {"b1": 0.8, "r1": 2, "r2": 2, "tasks": 2}, ("r1", "r2", "gap", "tasks")),
        (sj.dct_adam, NUMBERS | {"rank": 2}, ("rank", "every", "norm", "largest")),
        (sj.trion, NUMBERS | {"rank": 2, "momentum": 0.9}, ("rank", "norm", "largest")),
        (sj.methods.root.root, NUMBERS | {"quantile": 0.8, "momentum": 0.9, "rms": 0.1}, STATIC_ROOT),
        (sj.methods.aro.aro, NUMBERS | {"beta": 0.9, "rms": 0.1}, ("passes", "simultaneous", "largest")),
        (sj.lora_pro, PAIR | {"adapted": adapted()}, ("adapted",)),
        (sj.methods.lora_pro.lora_pro_adam, NUMBERS | PAIR | {"adapted": adapted()}, ("adapted",)),
        (sj.methods.lift.lift_adam, NUMBERS, ()),
        (sj.methods.lambda_orthogonality.add_lambda_orthogonality, {"weight": 0.1, "lam": 1.0, "alpha": 2.0}, ()),
        (sj.methods.gcr.grassmann_sgd, {"learning_rate": 0.1, "momentum": 0.9, "paths": "matrix"}, STATIC_SGD),
        (sj.methods.oft.coft_projection, {"radius": 1e-3}, ()),
        (sj.riemannian, {"manifold": STIEFEL, "inner": optax.sgd(0.1)}, ("manifold", "inner", *STATIC_SGD)),
        (sj.optim.in_subspace, {"inner": optax.scale_by_adam(), "rank": 2}, ("inner", "rank", "every", "seed")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_number_can_be_injected(factory, options, static):
    names = ("low_rank", "matrix", "vector")
    params, gradient = make_tree(0, names), make_tree(1, names)
    optimizer = optax.inject_hyperparams(factory, static_args=static)(**options)

    def run(params, gradient):
        state = optimizer.init(params)
        return *optimizer.update(gradient, state, params), state

    updates, new, old = jax.eval_shape(run, params, gradient)
    chex.assert_trees_all_equal_shapes(new, old)
    chex.assert_trees_all_equal_shapes(updates, params)
    assert {name for name, value in options.items() if isinstance(value, float)} <= set(old.hyperparams)
