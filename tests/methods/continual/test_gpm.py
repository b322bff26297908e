"""The memory against the published procedure in numpy, on dense layers, convolutions and stacks."""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import subspace_jax as sj
from subspace_jax.core import StructureError
from subspace_jax.methods.continual.gpm import GPMMemory
from tests.tolerances import tolerance

SIZE = 16


def numpy_gpm(basis, inputs, threshold):
    """The paper's update in float64: `inputs` are columns, `basis` is None at the first task."""
    total = np.sum(inputs**2)
    rest = inputs if basis is None else inputs - basis @ (basis.T @ inputs)
    u, s, _ = np.linalg.svd(rest, full_matrices=False)
    reached, count = total - np.sum(rest**2), 0
    while reached < threshold * total and count < len(s):
        reached += s[count] ** 2
        count += 1
    if basis is None:
        return u[:, :count]
    return np.concatenate([basis, u[:, :count]], axis=1)[:, : basis.shape[0]]


def inputs_of(task, count=60, size=SIZE, rank=5):
    """Rows near a subspace of the task's own, each direction of another strength."""
    rng = np.random.default_rng(task)
    strengths = 0.6 ** np.arange(rank)
    rows = (rng.normal(size=(count, rank)) * strengths) @ np.linalg.qr(rng.normal(size=(size, rank)))[0].T
    return rows + 1e-3 * rng.normal(size=rows.shape)


def live(memory):
    return np.asarray(memory.basis[:, : int(memory.rank)], np.float64)


def given(rows, form):
    rows = jnp.asarray(rows, jnp.float32)
    return {"activations": rows} if form == "rows" else {"gram": jnp.swapaxes(rows, -1, -2) @ rows}


@pytest.mark.parametrize("form", ["rows", "gram"])
@pytest.mark.parametrize("threshold", [0.8, 0.95, 0.99])
def test_tasks_add_what_the_procedure_adds(form, threshold):
    memory, expected = sj.methods.gpm.init_memory(SIZE), None
    update = jax.jit(lambda m, given: sj.methods.gpm.next_task(m, threshold=threshold, **given))
    ranks = []
    for task in (0, 1, 1, 2):
        rows = inputs_of(task)
        memory, expected = update(memory, given(rows, form)), numpy_gpm(expected, rows.T, threshold)
        ranks.append(int(memory.rank))
        assert ranks[-1] == expected.shape[1]
        np.testing.assert_allclose(scipy.linalg.subspace_angles(live(memory), expected), 0, atol=2e-3)
        np.testing.assert_allclose(live(memory).T @ live(memory), np.eye(ranks[-1]), atol=tolerance(size=4))
        assert not np.asarray(memory.basis[:, ranks[-1] :]).any()
    assert 0 < ranks[0] < ranks[1] == ranks[2] < ranks[3]  # a task that is known adds nothing


def test_the_official_code_leaves_out_one_vector_at_the_first_task():
    rows = jnp.asarray(inputs_of(0), jnp.float32)
    whole = sj.methods.gpm.next_task(sj.methods.gpm.init_memory(SIZE), rows, 0.95)
    less = sj.methods.gpm.next_task(sj.methods.gpm.init_memory(SIZE), rows, 0.95, official_off_by_one=True)
    shares = np.cumsum(np.linalg.svd(np.asarray(rows))[1] ** 2) / np.sum(np.asarray(rows) ** 2)
    assert int(less.rank) == np.sum(shares < 0.95) == int(whole.rank) - 1  # as their code counts
    np.testing.assert_array_equal(less.basis[:, : int(less.rank)], whole.basis[:, : int(less.rank)])
    other = jnp.asarray(inputs_of(1), jnp.float32)
    for off in (False, True):  # later tasks follow the paper
        later = sj.methods.gpm.next_task(whole, other, 0.95, official_off_by_one=off)
        expected = numpy_gpm(live(whole), np.asarray(other, np.float64).T, 0.95)
        assert int(later.rank) == expected.shape[1]


def test_a_larger_threshold_gives_a_larger_memory_around_the_smaller():
    rows = jnp.asarray(inputs_of(0), jnp.float32)
    memories = [
        sj.methods.gpm.next_task(sj.methods.gpm.init_memory(SIZE), rows, t) for t in (0.5, 0.8, 0.95, 0.99, 1.0)
    ]
    ranks = [int(m.rank) for m in memories]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[3]
    for small, large in itertools.pairwise(memories):
        np.testing.assert_allclose(live(large) @ (live(large).T @ live(small)), live(small), atol=1e-5)


@pytest.mark.parametrize("form", ["rows", "gram"])
def test_a_memory_takes_no_more_than_it_has_room_for(form):
    memory = sj.methods.gpm.init_memory(SIZE, 6)
    for task in range(4):
        before = memory
        memory = sj.methods.gpm.next_task(memory, threshold=0.99, **given(inputs_of(task), form))
        assert memory.basis.shape == (SIZE, 6)
        np.testing.assert_allclose(live(memory).T @ live(memory), np.eye(int(memory.rank)), atol=tolerance(size=4))
        np.testing.assert_allclose(memory.basis[:, : int(before.rank)], live(before), atol=tolerance(size=4))
    assert int(memory.rank) == 6


@pytest.mark.parametrize("form", ["rows", "gram"])
def test_there_is_nothing_to_add_beyond_the_inputs_own_span(form):
    """Rounding of the energies must not call for directions in which there is nothing; nor must no inputs at all."""
    rows = inputs_of(0) @ np.linalg.qr(np.random.default_rng(3).normal(size=(SIZE, 3)))[0]
    rows = rows @ np.linalg.qr(np.random.default_rng(4).normal(size=(SIZE, 3)))[0].T
    memory = sj.methods.gpm.next_task(sj.methods.gpm.init_memory(SIZE), threshold=1.0, **given(rows, form))
    assert int(memory.rank) == 3
    again = sj.methods.gpm.next_task(memory, threshold=1.0, **given(np.zeros((4, SIZE)), form))
    assert int(again.rank) == 3
    few = sj.methods.gpm.next_task(sj.methods.gpm.init_memory(SIZE), threshold=1.0, **given(rows[:2], form))
    assert int(few.rank) == 2


def test_a_stack_of_layers_is_each_layer_alone():
    rows = np.stack([inputs_of(t) for t in range(3)])
    threshold = jnp.array([0.8, 0.95, 0.99])
    for form in ("rows", "gram"):
        memory = sj.methods.gpm.next_task(
            sj.methods.gpm.init_memory(SIZE, stack=(3,)), threshold=threshold, **given(rows, form)
        )
        memory = sj.methods.gpm.next_task(memory, threshold=threshold, **given(rows[::-1].copy(), form))
        for i in range(3):
            alone = sj.methods.gpm.init_memory(SIZE)
            for task in (rows[i], rows[2 - i]):
                alone = sj.methods.gpm.next_task(alone, threshold=threshold[i], **given(task, form))
            assert int(memory.rank[i]) == int(alone.rank)
            np.testing.assert_allclose(memory.basis[i], alone.basis, atol=1e-4)


def test_directions_that_are_kept_stay_as_they_are():
    """Signs too, which a factorization would choose anew."""
    columns = scipy.linalg.hadamard(SIZE)[:, :2] / np.sqrt(SIZE)
    start = GPMMemory(jnp.zeros((SIZE, SIZE)).at[:, :2].set(columns), jnp.asarray(2, jnp.int32))
    memory = sj.methods.gpm.next_task(start, jnp.asarray(inputs_of(0), jnp.float32), 0.95)
    assert int(memory.rank) > 2
    np.testing.assert_allclose(memory.basis[:, :2], columns, atol=tolerance(size=4))


def test_twenty_tasks_leave_the_basis_orthonormal():
    memory, step = sj.methods.gpm.init_memory(64), jax.jit(sj.methods.gpm.next_task)
    for task in range(20):
        memory = step(memory, jnp.asarray(inputs_of(task, size=64), jnp.float32), 0.999)
    assert int(memory.rank) > 50
    np.testing.assert_allclose(live(memory).T @ live(memory), np.eye(int(memory.rank)), atol=tolerance(size=4))


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 0), (0, 2))])
@pytest.mark.parametrize("dilation", [(1, 1), (1, 2)])
def test_patches_times_the_kernel_are_the_convolution(strides, padding, dilation):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 8, 3)), jnp.float32)
    layer = nn.Conv(5, (2, 3), strides, padding, kernel_dilation=dilation, use_bias=False)
    params = layer.init(jax.random.key(0), x)
    kernel = params["params"]["kernel"]
    rows = sj.methods.gpm.conv_patches(x, (2, 3), strides, padding, dilation)
    expected = layer.apply(params, x)
    np.testing.assert_allclose((rows @ kernel.reshape(-1, 5)).reshape(expected.shape), expected, atol=1e-5)


def network(params, x):
    x = jax.nn.relu(
        jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    return jnp.einsum("bi,ihk->bhk", x.mean((1, 2)), params["heads"])


def test_a_network_answers_inputs_in_the_memory_as_it_did():
    """Capture, memory, projected training, with a convolution and a kernel with heads."""
    rng = np.random.default_rng(0)
    params = {
        "conv": jnp.asarray(rng.normal(size=(3, 3, 2, 6)), jnp.float32),
        "heads": jnp.asarray(rng.normal(size=(6, 2, 3)), jnp.float32),
    }
    images = jnp.asarray(rng.normal(size=(2, 4, 4, 1)) @ np.ones((1, 2)), jnp.float32)
    other = jnp.asarray(rng.normal(size=(8, 4, 4, 2)), jnp.float32)
    roles = sj.roles(network, params, images)
    stats = sj.capture(network, params, [images])
    memory = {
        path: sj.methods.gpm.next_task(sj.methods.gpm.init_memory(len(s.gram)), gram=s.gram, threshold=0.999999)
        for path, s in stats.items()
    }
    patches = sj.methods.gpm.next_task(
        sj.methods.gpm.init_memory(18), sj.methods.gpm.conv_patches(images, (3, 3)), 0.999999
    )
    np.testing.assert_allclose(
        memory["conv"].basis @ memory["conv"].basis.T, patches.basis @ patches.basis.T, atol=5e-3
    )
    assert 0 < int(memory["conv"].rank) < 18

    def train(optimizer):
        loss = lambda p: jnp.mean(jnp.square(network(p, other) - 1.0))

        @jax.jit
        def run(params):
            def step(carry, _):
                params, state = carry
                updates, state = optimizer.update(jax.grad(loss)(params), state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, optimizer.init(params)), None, length=20)[0][0]

        new = run(params)
        return float(loss(new)), new

    basis = {path: m.basis for path, m in memory.items()}
    before = network(params, images)
    ways = {
        "free": optax.sgd(0.01),
        "projected": optax.chain(sj.project_orthogonal(basis, roles=roles), optax.sgd(0.01)),
        "sandwich": sj.sandwich(optax.adam(0.01), basis, roles=roles),
    }
    moved = {}
    for name, optimizer in ways.items():
        value, new = train(optimizer)
        assert value < float(jnp.mean(jnp.square(network(params, other) - 1.0)))
        moved[name] = float(jnp.abs(network(new, images) - before).max() / jnp.abs(before).max())
    assert moved["free"] > 0.05
    assert moved["projected"] < 2e-3
    assert moved["sandwich"] < 2e-3


def test_bad_input_is_refused():
    memory = sj.methods.gpm.init_memory(4)
    with pytest.raises(ValueError, match="either the inputs as rows"):
        sj.methods.gpm.next_task(memory)
    with pytest.raises(StructureError, match=r"activations of shape \(3, 5\); a memory of 4 inputs needs \[n, 4\]"):
        sj.methods.gpm.next_task(memory, jnp.ones((3, 5)))
    with pytest.raises(StructureError, match=r"gram of shape \(3, 4\).*needs \[4, 4\]"):
        sj.methods.gpm.next_task(memory, gram=jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="columns=5"):
        sj.methods.gpm.init_memory(4, 5)
