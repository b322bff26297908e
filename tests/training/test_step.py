"""One step: against a step written by hand, accumulated against whole, traced once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import StructureError
from subspace_jax.training import init_train_state, make_train_step
from tests.tolerances import tolerance

from .problem import OPTIMIZER, loss, make_adapted, make_batch


def close(actual, expected, rtol=1e-5):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=tolerance(size=4))


def test_a_step_is_the_one_written_by_hand():
    adapted = make_adapted()
    trainable, frozen = sj.partition(adapted)
    opt_state = OPTIMIZER.init(trainable)
    state = init_train_state(adapted, OPTIMIZER, jax.random.key(1))
    step = make_train_step(loss, OPTIMIZER)
    for number in range(3):
        batch = make_batch(number)
        value, gradients = jax.value_and_grad(lambda t, b=batch: loss(sj.combine(t, frozen), b, None))(trainable)
        updates, opt_state = OPTIMIZER.update(gradients, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        state, metrics = step(state, batch)
        close((metrics["loss"], metrics["gradient_norm"]), (value, optax.tree.norm(gradients)))
    close((state.trainable, state.opt_state), (trainable, opt_state))
    assert int(state.step) == 3


def with_aux(adapted, batch, key):
    value = loss(adapted, batch, key)
    return value, {"root": jnp.sqrt(value), "mean of x": jnp.mean(batch["x"])}


@pytest.mark.parametrize("accumulate", [2, 4, 16])
def test_accumulation_equals_the_whole_batch(accumulate):
    found = []
    for count in (1, accumulate):
        step = make_train_step(with_aux, OPTIMIZER, accumulate=count, has_aux=True)
        state = init_train_state(make_adapted(), OPTIMIZER, jax.random.key(1))
        for number in range(2):
            state, metrics = step(state, make_batch(number))
        metrics.pop("root")  # the mean of roots is no root of a mean
        found.append((state.trainable, state.opt_state, metrics))
    close(found[1], found[0])


def test_weighted_accumulation_equals_the_mean_over_what_counts():
    """Rows that do not count are dealt out unevenly among the micro-batches."""

    def masked(adapted, batch, key):
        error = jnp.mean((sj.with_adapters(lambda p, x: x @ p["in"])(adapted, batch["x"])) ** 2, axis=-1)
        return jnp.sum(error * batch["counts"]) / jnp.sum(batch["counts"])

    batch = {"x": make_batch(0)["x"], "counts": np.array([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1], np.float32)}
    found = []
    for options in ({}, {"accumulate": 4, "weight": lambda b: jnp.sum(b["counts"])}, {"accumulate": 4}):
        state = init_train_state(make_adapted(), OPTIMIZER, jax.random.key(1))
        found.append(make_train_step(masked, OPTIMIZER, **options)(state, batch)[1])
    close(found[1], found[0])
    assert abs(found[2]["loss"] - found[0]["loss"]) > 1e-3


def test_the_program_is_traced_once():
    traces = []

    def counted(adapted, batch, key):
        traces.append(None)
        return loss(adapted, batch, key)

    for accumulate in (1, 4):
        step = make_train_step(counted, OPTIMIZER, accumulate=accumulate)
        state = init_train_state(make_adapted(), OPTIMIZER, jax.random.key(1))
        for number in range(3):
            state, _ = step(state, make_batch(number))
        assert len(traces) == 1
        traces.clear()


def test_every_step_and_micro_batch_has_its_own_key():
    def noisy(adapted, batch, key):
        return loss(adapted, batch, key), {"noise": jax.random.normal(key)}

    seen = []
    for accumulate in (1, 2):
        step = make_train_step(noisy, OPTIMIZER, accumulate=accumulate, has_aux=True)
        state = init_train_state(make_adapted(), OPTIMIZER, jax.random.key(1))
        for _ in range(2):
            state, metrics = step(state, make_batch(0))
            seen.append(float(metrics["noise"]))
    assert len(set(seen)) == 4
    keys = [jax.random.fold_in(jax.random.key(1), number) for number in range(2)]
    np.testing.assert_allclose(seen[:2], [jax.random.normal(key) for key in keys], rtol=tolerance())
    noises = [jnp.mean(jnp.stack([jax.random.normal(jax.random.fold_in(key, i)) for i in (0, 1)])) for key in keys]
    np.testing.assert_allclose(seen[2:], noises, rtol=tolerance())


def count_tanh(step, state):
    return step.lower(state, make_batch(0)).as_text().count("stablehlo.tanh")


def test_remat_recomputes_and_changes_no_number():
    found, counts = [], []
    for policy in (None, jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.everything_saveable):
        step = make_train_step(loss, OPTIMIZER, remat=policy)
        state = init_train_state(make_adapted(), OPTIMIZER, jax.random.key(1))
        counts.append(count_tanh(step, state))
        found.append(step(state, make_batch(0)))
    close((found[1][0].trainable, found[1][1]), (found[0][0].trainable, found[0][1]))
    assert counts == [1, 2, 1]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="accumulate=0; expected a positive int"):
        make_train_step(loss, OPTIMIZER, accumulate=0)
    state = init_train_state(make_adapted(), OPTIMIZER, jax.random.key(1))
    with pytest.raises(StructureError, match=r"x: make_train_step: an array of shape \(16, 16\) cannot be cut .*=3"):
        make_train_step(loss, OPTIMIZER, accumulate=3)(state, make_batch(0))
    with pytest.raises(ValueError, match="expected a dict of scalars"):
        make_train_step(lambda *a: (loss(*a), {"loss": 0.0}), OPTIMIZER, has_aux=True)(state, make_batch(0))
