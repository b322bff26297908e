"""Learners whose widths grow with their tasks do what those of one width do, for few programs and fewer operations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from tests.continual import streams
from tests.continual.streams import HEADS, TASKS, WIDTH, heads_of, kernel_of, loss, parameters
from tests.continual.test_stream import KEY, StoppedError, assert_same_bits, counting, stop_at, tasks_of

OPTIONS = {"gpm": {"threshold": 0.9999}, "osf": {"tasks": TASKS}}
IMPORTANCE = {"tasks": TASKS, "preserved": "importance", "target": 0.5}


def make(name, optimizer=None, objective=loss, **options):
    options = {"rules": HEADS, **OPTIONS[name], **options}
    return getattr(sj.methods, name).learner(objective, "kernel", optimizer or optax.sgd(0.2, 0.9), **options)


def follow(learner, tasks, steps=6):
    """States between tasks, the plans of the tasks, and how often the step was traced."""
    learner, traces = counting(learner)
    step = jax.jit(learner.step, donate_argnums=0)
    state, plans = learner.init(parameters(), jax.random.key(0)), []
    states = [jax.tree.map(jnp.copy, state)]
    for task in range(tasks):
        plans.append(learner.plan(state, task) if learner.plan else None)
        state = learner.start_task(state, task, jax.random.key(task))
        for batch in streams.batches(task, steps):
            state, _ = step(state, batch, jax.random.key(9))
        state = learner.end_task(state, task, streams.batches(task))
        states.append(jax.tree.map(jnp.copy, state))
    return states, plans, len(traces)


@pytest.mark.parametrize(
    ("name", "options"), [("gpm", {}), ("gpm", {"columns": 0.3}), ("osf", {}), ("osf", IMPORTANCE)]
)
def test_buckets_learn_what_the_common_width_learns(name, options):
    common, bucketed = (make(name, width=width, **options) for width in ("common", "bucketed"))
    assert common.plan is None
    expected, _, once = follow(common, TASKS)
    found, plans, programs = follow(bucketed, TASKS)
    assert once == 1
    assert jax.tree.structure(found[-1]) == jax.tree.structure(expected[-1])
    for ours, theirs in zip(found, expected, strict=True):
        shapes = lambda state: jax.tree.map(lambda v: (v.shape, v.dtype), state)
        assert shapes(ours) == shapes(theirs)
        np.testing.assert_allclose(kernel_of(bucketed, ours), kernel_of(common, theirs), atol=5e-4)
        np.testing.assert_allclose(heads_of(bucketed, ours), heads_of(common, theirs), atol=5e-4)
    assert np.abs(kernel_of(bucketed, found[-1]) - kernel_of(bucketed, found[1])).max() > 0.05
    if options is not IMPORTANCE:
        assert programs <= len({str(plan) for plan in plans}) <= TASKS


def test_the_plan_is_the_memory_in_eighths_and_the_ranks():
    states, plans, _ = follow(make("gpm", width="bucketed"), TASKS)
    ranks = [int(s.memory["kernel"].rank) for s in states[:-1]]
    assert ranks == [0, 4, 7, 10, 13]
    assert plans == [{"kernel": n} for n in (0, 6, 9, 12, 15)]  # an eighth of 20, rounded up, is 3
    assert follow(make("osf", width="bucketed"), TASKS, 1)[1] == [{"kernel": n} for n in (0, 4, 8, 12, 16)]


def test_tasks_of_one_plan_are_one_program():
    """The same three tasks over and over: the memory stops growing."""
    learner, traces = counting(make("gpm", width="bucketed"))
    step, state = jax.jit(learner.step), learner.init(parameters(), jax.random.key(0))
    for task in range(TASKS):
        state = learner.start_task(state, task, jax.random.key(task))
        for batch in streams.batches(min(task, 1), 3):
            state, _ = step(state, batch | {"task": jnp.asarray(task, jnp.int32)}, jax.random.key(9))
        state = learner.end_task(state, task, streams.batches(min(task, 1)))
    assert len(traces) == 3  # nothing to remove, 4 directions, 7 directions ever after


@pytest.mark.parametrize("width", ["common", "bucketed"])
def test_updates_alone_keep_the_outputs_of_old_inputs(width):
    learner = make("gpm", optax.adam(0.02), width=width, project_gradients=False)
    states, _, _ = follow(learner, 3)
    kernels = [kernel_of(learner, s) for s in states]
    for task in (0, 1):
        x = streams.inputs(task)
        basis = np.linalg.svd(x, full_matrices=False)[2][: streams.DIRECTIONS]
        change = (kernels[3] - kernels[task + 1]).astype(np.float64)
        np.testing.assert_allclose(basis @ change, 0, atol=2e-5)
        assert np.abs(change).max() > 0.01
    both = make("gpm", optax.adam(0.02), width=width)
    assert np.abs(kernel_of(both, follow(both, 3)[0][3]) - kernels[3]).max() > 1e-3  # another path


@pytest.mark.parametrize("width", ["common", "bucketed"])
def test_updates_alone_keep_the_large_singular_triples(width):
    learner = make("osf", optax.adam(0.02), width=width, project_gradients=False)
    states, _, _ = follow(learner, 3)
    for task, k in ((1, 4), (2, 8)):
        before, after = (kernel_of(learner, states[t]).astype(np.float64) for t in (task, task + 1))
        u, s, vt = np.linalg.svd(before)
        np.testing.assert_allclose(u[:, :k].T @ after, s[:k, None] * vt[:k], atol=2e-5)
        np.testing.assert_allclose(after @ vt[:k].T, u[:, :k] * s[:k], atol=2e-5)
        assert np.abs(after - before).max() > 0.01


BUCKETED = {"gpm": ("gpm", {}), "osf": ("osf", {}), "osf importance": ("osf", IMPORTANCE)}


def run_bucketed(case, **more):
    """Four tasks, by a learner that is made anew."""
    name, options = BUCKETED[case]
    return sj.run_stream(make(name, width="bucketed", **options), parameters(), tasks_of(4), key=KEY, **more)


uninterrupted = functools.cache(run_bucketed)


@pytest.mark.parametrize("case", BUCKETED)
@pytest.mark.parametrize("stop", [(2, 3), (3, 1)])
def test_a_stream_stopped_within_a_task_goes_on_to_the_same_bits(case, stop, tmp_path):
    def run(**more):
        with sj.io.Checkpointer(tmp_path, max_to_keep=1, base=parameters()) as checkpointer:
            return run_bucketed(case, checkpointer=checkpointer, save_every=2, **more)

    with pytest.raises(StoppedError):
        run(on_step=stop_at(*stop))
    seen = []
    resumed = run(on_step=lambda task, step, metrics: seen.append((task, step)))
    assert seen[0] == stop
    assert_same_bits(resumed, uninterrupted(case))


def stacked(params, batch):
    hidden, _ = jax.lax.scan(lambda x, kernel: (x + jax.nn.relu(x @ kernel), None), batch["x"], params["kernel"])
    return hidden @ params["heads"][batch["task"]]


def stacked_loss(params, batch):
    logits = sj.with_adapters(stacked)(params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


@pytest.mark.parametrize(
    ("name", "options"),
    [("gpm", {}), ("osf", {"tasks": 2, "preserved": lambda task: {"kernel": np.array([4, 12]) * task}})],
)
def test_a_stack_has_the_width_of_its_fullest_layer(name, options):
    rng = np.random.default_rng(1)
    shapes = {"kernel": (2, WIDTH, WIDTH), "heads": (5, WIDTH, 3)}
    params = {n: jnp.asarray(rng.normal(size=s) / np.sqrt(WIDTH), jnp.float32) for n, s in shapes.items()}
    roles, kernels = sj.roles(stacked, params, next(streams.batches(0))), []
    for width in ("common", "bucketed"):
        learner = make(name, objective=stacked_loss, width=width, roles=roles, **options)
        state, step = learner.init(params, jax.random.key(0)), jax.jit(learner.step)
        for task in (0, 1):
            plan = learner.plan(state, task) if learner.plan else None
            fullest = int(np.max(state.memory["kernel"].rank)) if name == "gpm" else 0
            state = learner.start_task(state, task, jax.random.key(task))
            for batch in streams.batches(task, 4):
                state, _ = step(state, batch, jax.random.key(9))
            state = learner.end_task(state, task, streams.batches(task))
        kernels.append(kernel_of(learner, state))
    np.testing.assert_allclose(kernels[1], kernels[0], atol=5e-4)
    if name == "osf":
        assert plan == {"kernel": [4, 12]}
    else:
        assert plan["kernel"] == 3 * -(-fullest // 3)


@pytest.mark.parametrize("name", ["gpm", "osf"])
@pytest.mark.parametrize("width", ["common", "bucketed"])
def test_runs_where_mesh_axes_are_explicit(name, width):
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    learner = make(name, width=width)
    expected = follow(learner, 3, 2)[0][-1]
    with jax.set_mesh(mesh):
        found = follow(make(name, width=width), 3, 2)[0][-1]
    np.testing.assert_allclose(kernel_of(learner, found), kernel_of(learner, expected), atol=1e-4)


def test_the_operations_of_a_step_fall_with_the_width():
    """Of kernels alone, with as many rows as a bucket pays for."""
    size, rows = 64, 128
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(size, size)) / 8, jnp.float32)}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, 4)) @ np.ones((4, size)), jnp.float32)
    objective = lambda params, batch: jnp.mean(sj.with_adapters(lambda p: jnp.tanh(batch @ p["kernel"]))(params) ** 2)

    def flops(learner, tasks=2):
        state = learner.init(params, jax.random.key(0))
        for task in range(tasks):
            state = learner.start_task(state, task, jax.random.key(0))
            if task < tasks - 1:
                state = learner.end_task(state, task, [x])
        compiled = jax.jit(learner.step).lower(state, x, jax.random.key(0)).compile()
        return (compiled.cost_analysis() or {})["flops"]

    plain = flops(sj.continual.sequential_learner(objective, {"kernel": sj.full()}, optax.sgd(0.1)))
    for name, options in (("gpm", {"threshold": 0.9}), ("osf", {"tasks": 8})):
        ways = [{"width": "common"}, {"width": "bucketed"}, {"width": "bucketed", "project_gradients": False}]
        found = [flops(make(name, optax.sgd(0.1), objective, rules=None, **options, **way)) / plain for way in ways]
        assert found == sorted(found, reverse=True)
        assert found[0] - found[1] > 0.2, found


@pytest.mark.parametrize("name", ["gpm", "osf"])
def test_other_widths_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}.learner: width='exact'"):
        make(name, width="exact")
