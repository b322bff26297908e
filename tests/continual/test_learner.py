"""Every learner keeps what it promises to keep, learns, and refuses to be used out of order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.continual import StreamError
from subspace_jax.core import PatternError, RoleError, StructureError
from tests.continual import streams
from tests.continual.streams import HEADS, LEARNERS, TASKS, heads_of, kernel_of, loss, parameters

compiled_loss = jax.jit(loss)


def follow(learner, tasks, steps=6):
    """States between tasks, from the first on; their arrays are copies."""
    step = jax.jit(learner.step, donate_argnums=0)
    state = learner.init(parameters(), jax.random.key(0))
    states = [jax.tree.map(jnp.copy, state)]
    for task in range(tasks):
        state = learner.start_task(state, task, jax.random.key(task))
        for batch in streams.batches(task, steps):
            state, metrics = step(state, batch, jax.random.key(9))
        assert np.isfinite(metrics["loss"])
        state = learner.end_task(state, task, streams.batches(task))
        states.append(jax.tree.map(jnp.copy, state))
    return states


@pytest.fixture(scope="module")
def followed():
    """Of every learner its states between three tasks."""
    found = {}

    def get(name):
        if name not in found:
            learner = LEARNERS[name]()
            found[name] = learner, follow(learner, 3)
        return found[name]

    return get


@pytest.mark.parametrize("name", LEARNERS)
def test_learns_and_leaves_other_heads_and_frozen_arrays_alone(name, followed):
    learner, states = followed(name)
    for task in range(3):
        before, after = (np.array(heads_of(learner, s)) for s in states[task : task + 2])
        others = np.arange(TASKS) != task
        if name == "joint":
            others &= np.arange(TASKS) >= task  # whose momentum goes on
        np.testing.assert_array_equal(before[others], after[others])
        assert np.abs(before[task] - after[task]).max() > 1e-3
        pair = [learner.params(s) for s in states[task : task + 2]]
        losses = [np.mean([compiled_loss(params, b) for b in streams.batches(task)]) for params in pair]
        assert losses[1] < 0.95 * losses[0]
        np.testing.assert_array_equal(learner.params(states[task + 1])["features"], parameters()["features"])
        assert np.abs(kernel_of(learner, states[task]) - kernel_of(learner, states[task + 1])).max() > 1e-3


@pytest.mark.parametrize("name", LEARNERS)
def test_state_is_arrays_of_the_same_shapes(name, followed):
    _, states = followed(name)
    for state in states[1:]:
        assert jax.tree.structure(state) == jax.tree.structure(states[0])
        for (path, first), leaf in zip(jax.tree.leaves_with_path(states[0]), jax.tree.leaves(state), strict=True):
            assert isinstance(leaf, jax.Array), path
            assert (leaf.shape, leaf.dtype, leaf.weak_type) == (first.shape, first.dtype, first.weak_type), path
    assert [int(s.task) for s in states] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["gpm", "coso"])
def test_outputs_for_old_inputs_stay(name, followed):
    learner, states = followed(name)
    kernels = [kernel_of(learner, s) for s in states]
    for task in (0, 1):
        x = streams.inputs(task)
        kept = x @ kernels[task + 1]
        assert np.abs(kept - x @ kernels[0]).max() > 0.01
        np.testing.assert_allclose(x @ kernels[3], kept, atol=2e-5)
    plain, free = followed("sequential")
    x = streams.inputs(0)
    assert np.abs(x @ kernel_of(plain, free[3]) - x @ kernel_of(plain, free[1])).max() > 0.01


def test_gpm_remembers_the_span_of_what_it_was_shown(followed):
    _, states = followed("gpm")
    basis = np.asarray(states[2].memory["kernel"].basis)
    assert [int(s.memory["kernel"].rank) for s in states] == [0, 4, 7, 10]
    x = np.concatenate([streams.inputs(0), streams.inputs(1)])
    np.testing.assert_allclose(x @ basis @ basis.T, x, atol=1e-4)


def test_gpm_has_room_for_a_share_and_a_threshold_by_task():
    learner = sj.methods.gpm.learner(
        loss, ["kernel"], optax.sgd(0.1), threshold=lambda task: (0.3, 0.9999)[task], columns=0.3, rules=HEADS
    )
    memories = [s.memory["kernel"] for s in follow(learner, 2, steps=1)]
    assert memories[0].basis.shape == (20, 6)
    x = streams.inputs(0)
    energy = np.linalg.svd(x, compute_uv=False) ** 2
    needed = 1 + int(np.sum(np.cumsum(energy) / energy.sum() < 0.3))
    assert [int(m.rank) for m in memories] == [0, needed, min(6, needed + 4)]


def test_osf_keeps_the_large_singular_triples(followed):
    learner, states = followed("osf")
    for task, k in ((1, 4), (2, 8)):  # a fifth and two fifths of 20
        u, s, vt = np.linalg.svd(kernel_of(learner, states[task]))
        after = kernel_of(learner, states[task + 1])
        np.testing.assert_allclose(u[:, :k].T @ after, s[:k, None] * vt[:k], atol=2e-5)
        np.testing.assert_allclose(after @ vt[:k].T, u[:, :k] * s[:k], atol=2e-5)
        change = u[:, k:].T @ (after - kernel_of(learner, states[task])) @ vt[k:].T
        assert np.linalg.matrix_rank(change, tol=1e-4) > 1


def test_osf_by_importance_freezes_by_the_cosine_of_inputs_and_outputs(followed):
    learner, states = followed("osf importance")
    kernel = kernel_of(learner, states[1])
    x = streams.inputs(0)
    cosines = np.sum(x * (x @ kernel), -1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(x @ kernel, axis=-1)
    np.testing.assert_allclose(states[1].memory["kernel"], cosines.mean(), rtol=1e-4)
    # With one kernel its importance is the mean, so that it keeps the target share.
    started = learner.start_task(jax.tree.map(jnp.copy, states[1]), 1, jax.random.key(0))
    assert int(np.sum(started.adapted["kernel"].live)) == 10
    first = learner.start_task(jax.tree.map(jnp.copy, states[0]), 0, jax.random.key(0))
    assert int(np.sum(first.adapted["kernel"].live)) == 20


def test_o_lora_freezes_the_factors_of_finished_tasks(followed):
    learner, states = followed("o_lora")
    finished = [(np.asarray(s.adapted["kernel"].a), np.asarray(s.adapted["kernel"].b)) for s in states[1:]]
    last = states[3].adapted["kernel"]
    for task in (0, 1):
        place = slice(2 * task, 2 * task + 2)
        np.testing.assert_array_equal(last.base.a[:, place], finished[task][0])
        np.testing.assert_array_equal(last.base.b[place], finished[task][1])
    np.testing.assert_array_equal(last.base.a[:, 4:], 0)
    np.testing.assert_array_equal(last.base.base, parameters()["kernel"])
    whole = parameters()["kernel"] + 16.0 * sum(a @ b for a, b in finished)
    np.testing.assert_allclose(kernel_of(learner, states[3]), whole, atol=1e-4)


def test_o_lora_adds_its_penalty_and_dropout_follows_the_key():
    learner = sj.methods.o_lora.learner(
        loss, "kernel", optax.sgd(0.1), tasks=2, rank=2, overlap_weight=3.0, dropout=0.5, rules=HEADS
    )
    state = follow(learner, 1)[1]
    started = learner.start_task(state, 1, jax.random.key(1))
    batch = next(streams.batches(1))
    results = [learner.step(started, batch, jax.random.key(seed)) for seed in (2, 2, 3)]
    weight = started.adapted["kernel"]
    expected = 3.0 * np.abs(np.asarray(weight.base.a).T @ np.asarray(weight.a)).sum()
    np.testing.assert_allclose(results[0][1]["penalty"], expected, rtol=1e-5)
    moved = [np.asarray(s.adapted["heads"].value) for s, _ in results]
    np.testing.assert_array_equal(moved[0], moved[1])
    # The new factors add nothing yet, so that dropping their inputs shows in their own gradient only.
    factors = [np.asarray(s.adapted["kernel"].b) for s, _ in results]
    assert np.abs(factors[0] - factors[2]).max() > 1e-6


def numpy_gradients(params, batch):
    """Gradients of kernel and heads, by hand."""
    x, task = np.asarray(batch["x"], np.float64), int(batch["task"])
    kernel, features, head = params["kernel"], params["features"], params["heads"][task]
    first = x @ kernel
    second = np.maximum(first, 0) @ features
    logits = np.maximum(second, 0) @ head
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    share[np.arange(len(x)), np.asarray(batch["y"])] -= 1
    share /= len(x)
    back = (share @ head.T * (second > 0)) @ features.T * (first > 0)
    heads = np.zeros_like(params["heads"])
    heads[task] = np.maximum(second, 0).T @ share
    return {"kernel": x.T @ back, "heads": heads}


@pytest.mark.parametrize("make", [sj.continual.sequential_learner, sj.continual.joint_learner])
def test_sequential_and_joint_are_heavy_ball_with_and_without_a_new_start(make):
    learner = make(loss, {"kernel": sj.full()} | HEADS, optax.sgd(0.1, momentum=0.9))
    state = follow(learner, 2, steps=3)[2]
    params = {n: np.asarray(v, np.float64) for n, v in parameters().items()}
    trace = {n: np.zeros_like(params[n]) for n in ("kernel", "heads")}
    for task in (0, 1):
        if task and make is sj.continual.sequential_learner:
            trace = {n: np.zeros_like(v) for n, v in trace.items()}
        for batch in streams.batches(task, 3):
            gradients = numpy_gradients(params, batch)
            trace = {n: 0.9 * trace[n] + gradients[n] for n in trace}
            params |= {n: params[n] - 0.1 * trace[n] for n in trace}
    np.testing.assert_allclose(kernel_of(learner, state), params["kernel"], atol=1e-5)
    np.testing.assert_allclose(heads_of(learner, state), params["heads"], atol=1e-5)


def stacked(params, batch):
    """Two layers in one array, a loop over them, and heads."""

    def layer(x, kernel):
        return x + jax.nn.relu(x @ kernel), None

    hidden, _ = jax.lax.scan(layer, batch["x"], params["kernel"])
    return hidden @ params["heads"][batch["task"]]


def stacked_loss(params, batch):
    logits = sj.with_adapters(stacked)(params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


RANKS = np.array([4, 12])
STACKED = {
    "o_lora": lambda **kw: sj.methods.o_lora.learner(stacked_loss, "kernel", optax.adam(0.02), tasks=2, rank=2, **kw),
    "gpm": lambda **kw: sj.methods.gpm.learner(stacked_loss, "kernel", optax.adam(0.02), threshold=0.9999, **kw),
    "osf": lambda **kw: sj.methods.osf.learner(stacked_loss, "kernel", optax.adam(0.02), tasks=2, **kw),
    "osf by layer": lambda **kw: sj.methods.osf.learner(
        stacked_loss, "kernel", optax.adam(0.02), tasks=2, preserved=lambda task: {"kernel": RANKS * task}, **kw
    ),
    "coso": lambda **kw: sj.methods.coso.learner(
        stacked_loss, "kernel", streams.coso(0.02), energy_threshold=2.0, rules_optimizer=optax.adam(0.02), **kw
    ),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked_layers_are_kept_layer_by_layer(name):
    rng = np.random.default_rng(1)
    shapes = {"kernel": (2, 20, 20), "heads": (5, 20, 3)}
    params = {n: jnp.asarray(rng.normal(size=s) / np.sqrt(20), jnp.float32) for n, s in shapes.items()}
    found = sj.roles(stacked, params, next(streams.batches(0)))
    learner = STACKED[name](rules=HEADS, roles=found)
    state, step, kernels = learner.init(params, jax.random.key(0)), jax.jit(learner.step), []
    for task in (0, 1):
        kernels.append(kernel_of(learner, state))
        state = learner.start_task(state, task, jax.random.key(task))
        for batch in streams.batches(task, 6):
            state, _ = step(state, batch, jax.random.key(9))
        state = learner.end_task(state, task, streams.batches(task))
    kernels.append(kernel_of(learner, state))
    assert np.abs(kernels[2] - kernels[1]).max((-2, -1)).min() > 1e-3
    if name in ("gpm", "coso"):
        x = streams.inputs(0)  # into the first layer; those of the second have changed with it
        np.testing.assert_allclose(x @ kernels[2][0], x @ kernels[1][0], atol=2e-5)
    if name.startswith("osf"):
        for layer, k in enumerate((10, 10) if name == "osf" else (4, 12)):
            u, s, vt = np.linalg.svd(kernels[1][layer])
            np.testing.assert_allclose(u[:, :k].T @ kernels[2][layer], s[:k, None] * vt[:k], atol=2e-5)
    if name == "o_lora":
        assert state.adapted["kernel"].base.a.shape == (2, 20, 2)


@pytest.mark.parametrize("name", LEARNERS)
def test_the_callers_parameters_survive_donated_steps(name, followed):
    params, (learner, _) = parameters(), followed(name)
    state = learner.start_task(learner.init(params, jax.random.key(0)), 0, jax.random.key(1))
    jax.jit(learner.step, donate_argnums=0)(state, next(streams.batches(0)), jax.random.key(2))
    for name, value in parameters().items():
        np.testing.assert_array_equal(params[name], value)


@pytest.mark.parametrize("name", LEARNERS)
def test_order_is_kept(name, followed):
    learner, states = followed(name)
    batch, key = next(streams.batches(0)), jax.random.key(0)
    with pytest.raises(StreamError, match=r"step: no task is running.*start_task"):
        jax.jit(learner.step)(states[1], batch, key)
    with pytest.raises(StreamError, match=r"end_task\(0\), but no task is running: 1 have ended"):
        learner.end_task(states[1], 0, [batch])
    with pytest.raises(StreamError, match=r"start_task\(3\), but it is the turn of task 1"):
        learner.start_task(states[1], 3, key)
    running = learner.start_task(jax.tree.map(jnp.copy, states[1]), 1, key)
    with pytest.raises(StreamError, match=r"start_task\(2\) while task 1 is running"):
        learner.start_task(running, 2, key)
    with pytest.raises(StreamError, match=r"end_task\(0\), but it is the turn of task 1"):
        learner.end_task(running, 0, [batch])
    with pytest.raises(StreamError, match="a Python int from zero"):
        learner.start_task(states[1], True, key)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sj.methods.o_lora.learner(loss, "kernel", optax.sgd(0.1), tasks=1, rank=2, rules=HEADS),
        lambda: sj.methods.osf.learner(loss, "kernel", optax.sgd(0.1), tasks=1, rules=HEADS),
    ],
)
def test_more_tasks_than_there_is_room_for_are_refused(make):
    learner = make()
    state = follow(learner, 1, steps=1)[1]
    with pytest.raises(StreamError, match=r"room for 1 tasks, 0 to 0. Make the learner with tasks="):
        learner.start_task(state, 1, jax.random.key(0))


def test_a_full_history_of_coso_is_refused():
    rules = {"rules": HEADS, "rules_optimizer": optax.sgd(0.1)}
    learner = sj.methods.coso.learner(loss, "kernel", streams.coso(0.1, tasks=1), energy_threshold=2.0, **rules)
    with pytest.raises(StructureError, match=r"kernel.*: the history would have 7 directions and has room for 4"):
        follow(learner, 2, steps=2)


def test_bad_arguments_are_refused():
    sgd = optax.sgd(0.1)
    with pytest.raises(StreamError, match="tasks=0"):
        sj.methods.osf.learner(loss, "kernel", sgd, tasks=0)
    with pytest.raises(StreamError, match="tasks=True"):
        sj.methods.o_lora.learner(loss, "kernel", sgd, tasks=True)
    with pytest.raises(StreamError, match="preserved='all'"):
        sj.methods.osf.learner(loss, "kernel", sgd, tasks=2, preserved="all")
    with pytest.raises(StreamError, match=r"columns=1.5; expected a share"):
        sj.methods.gpm.learner(loss, "kernel", sgd, columns=1.5)
    with pytest.raises(StructureError, match="rules= and rules_optimizer= both"):
        sj.methods.coso.learner(loss, "kernel", streams.coso(0.1), rules=HEADS)
    key = jax.random.key(0)
    with pytest.raises(StructureError, match=r"holds no coso; pass sj\.coso"):
        sj.methods.coso.learner(loss, "kernel", sgd).init(parameters(), key)
    with pytest.raises(PatternError, match="kernle"):
        sj.methods.osf.learner(loss, "kernle", sgd, tasks=2).init(parameters(), key)
    with pytest.raises(RoleError, match=r"heads: shape \(5, 16, 3\)"):
        sj.methods.gpm.learner(loss, "heads", sgd).init(parameters(), key)


def test_osf_by_importance_goes_through_layers_that_turn_their_inputs_round():
    """A kernel near -1 has a cosine near -1, by which nothing can be measured: the target share is frozen."""
    square = lambda params, batch: sj.with_adapters(lambda p: jnp.mean((batch @ p["w"] - 1.0) ** 2))(params)
    learner = sj.methods.osf.learner(square, "w", optax.sgd(0.01), tasks=2, preserved="importance", target=0.5)
    state = learner.init({"w": -jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))}, jax.random.key(0))
    state = learner.start_task(state, 0, jax.random.key(1))
    state, _ = learner.step(state, jnp.eye(4), jax.random.key(2))
    state = learner.end_task(state, 0, [jnp.eye(4)])
    assert float(state.memory["w"]) < 0
    with pytest.warns(UserWarning, match="mean importance"):
        state = learner.start_task(state, 1, jax.random.key(1))
    assert int(jnp.sum(state.adapted["w"].live)) == 2
