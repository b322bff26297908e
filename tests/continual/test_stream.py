"""Streams: one compiled step, the accuracy matrix, and runs that stop and go on to the same bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.continual import StreamError
from subspace_jax.metrics import backward_transfer
from tests.continual import streams
from tests.continual.streams import HEADS, LEARNERS, TASKS, loss, parameters

KEY = jax.random.key(3)
predict = jax.jit(lambda params, batch: streams.apply(params, batch).argmax(-1))


def accuracy(params, task):
    return float(np.mean([np.mean(predict(params, b) == b["y"]) for b in streams.batches(task, 9, 6)]))


def tasks_of(count, steps=5):
    """Tasks with test batches that no training sees."""

    def one(task):
        return sj.continual.StreamTask(
            f"task {task}",
            lambda start: streams.batches(task, steps, start),
            lambda params: accuracy(params, task),
            lambda: streams.batches(task, 2),
        )

    return [one(task) for task in range(count)]


def counting(learner):
    """The learner, and a list that grows whenever its step is traced."""
    traces = []

    def step(*arguments):
        traces.append(1)
        return learner.step(*arguments)

    return learner._replace(step=step), traces


class StoppedError(Exception):
    """What a test stops a stream with."""


def stop_at(task, step):
    def on_step(number, steps, metrics):
        if (number, steps) == (task, step):
            raise StoppedError

    return on_step


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", LEARNERS)
def test_five_tasks_compile_one_step_and_a_stopped_stream_goes_on_to_the_same_bits(name, tmp_path):
    learner, traces = counting(LEARNERS[name]())
    whole = sj.run_stream(learner, parameters(), tasks_of(TASKS), key=KEY)
    assert len(traces) == 1
    assert int(whole.state.task) == TASKS

    def run(**options):
        # Everything is made anew, as another process would.
        learner, traces = counting(LEARNERS[name]())
        with sj.io.Checkpointer(tmp_path, max_to_keep=1, base=parameters()) as checkpointer:
            options |= {"checkpointer": checkpointer}
            return sj.run_stream(learner, parameters(), tasks_of(TASKS), key=KEY, **options), traces

    with pytest.raises(StoppedError):
        run(on_step=stop_at(1, 3), save_every=2)  # after the checkpoint at step 2 of the second task
    seen = []
    resumed, traces = run(on_step=lambda task, step, metrics: seen.append((task, step)))
    assert seen[0] == (1, 3)
    assert len(seen) == 3 * 5 + 3
    assert len(traces) == 1
    assert_same_bits(resumed, whole)
    again, traces = run(on_step=stop_at(0, 1))  # there is nothing left to do
    assert not traces
    assert_same_bits(again, whole)


@pytest.mark.parametrize("name", ["gpm", "coso", "osf"])
def test_a_stream_stopped_between_tasks_goes_on(name, tmp_path):
    whole = sj.run_stream(LEARNERS[name](), parameters(), tasks_of(3), key=KEY, evaluate="all")

    def run(**options):
        with sj.io.Checkpointer(tmp_path) as checkpointer:
            options |= {"checkpointer": checkpointer, "evaluate": "all"}
            return sj.run_stream(LEARNERS[name](), parameters(), tasks_of(3), key=KEY, **options)

    with pytest.raises(StoppedError):
        run(on_step=stop_at(2, 1))
    seen = []
    resumed = run(on_task=lambda task, row: seen.append((task, row)))
    assert_same_bits(resumed, whole)
    assert [task for task, _ in seen] == [2]
    np.testing.assert_array_equal(seen[0][1], whole.matrix[2])


def test_streams_of_one_learner_share_its_compiled_step():
    learner, traces = counting(LEARNERS["sequential"]())
    for seed in (0, 1):
        sj.run_stream(learner, parameters(seed), tasks_of(2), key=jax.random.key(seed))
    assert len(traces) == 1


@pytest.mark.parametrize("evaluate", ["seen", "all", "last"])
def test_matrix_has_the_accuracies_after_each_task(evaluate):
    learner = LEARNERS["sequential"]()
    found = sj.run_stream(learner, parameters(), tasks_of(3), key=KEY, evaluate=evaluate)
    assert found.matrix.shape == (3, 3)
    # By hand, step by step.
    state, expected = learner.init(parameters(), KEY), np.full((3, 3), np.nan)
    base = [accuracy(learner.params(state), i) for i in range(3)]
    for task in range(3):
        state = learner.start_task(state, task, KEY)
        for batch in streams.batches(task, 5):
            state, _ = jax.jit(learner.step)(state, batch, KEY)
        state = learner.end_task(state, task, [])
        expected[task] = [accuracy(learner.params(state), i) for i in range(3)]
    wanted = {"seen": np.tril(np.ones((3, 3))), "all": np.ones((3, 3)), "last": np.eye(3)[2:].T * np.ones(3)}[evaluate]
    np.testing.assert_array_equal(np.isnan(found.matrix), wanted == 0)
    np.testing.assert_array_equal(found.matrix[wanted > 0], expected[wanted > 0])
    np.testing.assert_array_equal(found.base, base if evaluate == "all" else np.full(3, np.nan))


def test_callbacks_get_every_step_and_row():
    steps, rows = [], []
    result = sj.run_stream(
        LEARNERS["o_lora"](),
        parameters(),
        tasks_of(2),
        key=KEY,
        on_step=lambda *event: steps.append(event),
        on_task=lambda *event: rows.append(event),
    )
    assert [(task, step) for task, step, _ in steps] == [(t, s) for t in range(2) for s in range(1, 6)]
    assert all(np.isfinite(metrics["loss"]) for _, _, metrics in steps)
    assert float(steps[0][2]["penalty"]) == 0
    assert float(steps[-1][2]["penalty"]) > 0
    np.testing.assert_array_equal(np.stack([row for _, row in rows]), result.matrix)


def test_keys_differ_between_steps_tasks_and_streams():
    seen = []
    plain = LEARNERS["sequential"]()

    def start_task(state, task, key):
        seen.append(jax.random.key_data(key))
        return plain.start_task(state, task, key)

    def step(state, batch, key):
        jax.debug.callback(seen.append, jax.random.key_data(key))
        return state, {}

    for seed in (0, 1):
        learner = plain._replace(start_task=start_task, step=step)
        sj.run_stream(learner, parameters(), tasks_of(2, 3), key=jax.random.key(seed))
    jax.effects_barrier()
    assert len(seen) == 2 * 2 * (1 + 3)
    assert len({np.asarray(k).tobytes() for k in seen}) == len(seen)


def test_a_checkpoint_of_another_stream_is_refused(tmp_path):
    def run(learner, tasks, key=KEY):
        with sj.io.Checkpointer(tmp_path) as checkpointer:
            return sj.run_stream(learner, parameters(), tasks, key=key, checkpointer=checkpointer)

    def lora(rank):
        return sj.continual.sequential_learner(loss, {"kernel": sj.lora(rank, alpha=4.0)} | HEADS, optax.sgd(0.1))

    run(lora(2), tasks_of(2, 1))
    with pytest.raises(StreamError, match=r"checkpoint 4 is of the stream .*'task 0', 'task 1'.* and this one"):
        run(lora(2), tasks_of(3, 1))
    with pytest.raises(StreamError, match="'learner': 'osf'"):
        run(LEARNERS["osf"](), tasks_of(2, 1))
    with pytest.raises(StreamError, match="the arguments that it was begun with"):
        run(lora(2), tasks_of(2, 1), jax.random.key(4))
    with pytest.raises((StreamError, ValueError)):
        run(lora(3), tasks_of(2, 1))
    with pytest.raises(StreamError, match=r"another structure.*other rules or ranks"):
        run(sj.continual.sequential_learner(loss, {"kernel": sj.full()} | HEADS, optax.sgd(0.1)), tasks_of(2, 1))


def test_bad_streams_are_refused():
    learner = LEARNERS["sequential"]()

    def run(tasks, **options):
        return sj.run_stream(learner, parameters(), tasks, key=KEY, **options)

    with pytest.raises(StreamError, match="no tasks"):
        run([])
    with pytest.raises(StreamError, match="evaluate='some'"):
        run(tasks_of(1), evaluate="some")
    with pytest.raises(StreamError, match="save_every=0"):
        run(tasks_of(1), save_every=0)
    empty = sj.continual.StreamTask("nothing", lambda start: iter(()), lambda params: 0.0)
    with pytest.raises(StreamError, match=r"task 1, 'nothing': batches\(0\) yields nothing"):
        run([*tasks_of(1), empty])


def test_scores_are_those_of_the_definitions():
    rng = np.random.default_rng(0)
    matrix, base = rng.uniform(size=(4, 4)), rng.uniform(size=4)
    lower = np.where(np.tril(np.ones((4, 4))), matrix, np.nan)
    expected = {
        "average_accuracy": matrix[3].mean(),
        "incremental_accuracy": np.mean([matrix[t, : t + 1].mean() for t in range(4)]),
        "backward_transfer": np.mean([matrix[3, i] - matrix[i, i] for i in range(3)]),
        "forgetting": np.mean([matrix[i:3, i].max() - matrix[3, i] for i in range(3)]),
        "learning_accuracy": np.trace(matrix) / 4,
        "forward_transfer": np.mean([matrix[i - 1, i] - base[i] for i in range(1, 4)]),
    }
    found = sj.continual.stream_scores(matrix, base)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-5)
    without = sj.continual.stream_scores(lower)
    assert without.forward_transfer is None
    assert without[:5] == found[:5]
    assert sj.continual.stream_scores(lower, base).forward_transfer is None


def test_scores_of_an_unfinished_matrix_are_refused():
    matrix = np.full((3, 3), np.nan)
    matrix[0, 0] = 0.5
    assert np.isnan(backward_transfer(matrix))
    with pytest.raises(StreamError, match=r"no score on task 0 after training on task 1\. Finish the stream"):
        sj.continual.stream_scores(matrix)
    with pytest.raises(ValueError, match="at least 2 tasks"):
        sj.continual.stream_scores(np.ones((1, 1)))


def test_jnp_matrices_are_fine():
    assert sj.continual.stream_scores(jnp.eye(2)).learning_accuracy == 1.0
